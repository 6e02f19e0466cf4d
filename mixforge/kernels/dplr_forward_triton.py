"""The forward kernels of the recurrences in `dplr_triton`, which has the equations."""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_rows(bh, c, T, H: tl.constexpr, C: tl.constexpr):
    """Rows [C] of a chunk and head among those of all tokens and heads, and which of them there are."""
    time = c * C + tl.arange(0, C)
    return ((bh // H).to(tl.int64) * T + time) * H + bh % H, time < T


@triton.jit
def chunk_powers(log, spot, mask, C: tl.constexpr, D: tl.constexpr, HAS: tl.constexpr):
    """e^(G - F), e^(F - G), e^(L - G), e^G and e^-g [C, D], and e^L [D]; ones where there is no decay."""
    one = tl.full([C, D], 1.0, tl.float32)
    if not HAS:
        return one, one, one, one, one, tl.full([D], 1.0, tl.float32)
    else:
        within = tl.arange(0, C)[:, None]
        # Rows beyond the sequence keep all, so that its last sum is that of the last row.
        g = tl.load(log + spot, mask=mask, other=0.0).to(tl.float32)
        total = tl.cumsum(g, 0)
        first = tl.sum(tl.where(within == 0, g, 0.0), 0)
        last = tl.sum(tl.where(within == C - 1, total, 0.0), 0)
        inner = total - first[None, :]
        away = tl.exp(last[None, :] - total)
        return tl.exp(inner), tl.exp(-inner), away, tl.exp(total), tl.exp(-g), tl.exp(last)


@triton.jit
def load_rows(x, spot, mask):
    return tl.load(x + spot, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, spot, values, mask):
    tl.store(x + spot, values.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "NC"])
def dplr_pairs(
    q, k, removal, log, q_read, k_write, a_read, b_write, keep, pairs, removed, solved, inverse, T, NC,
    H: tl.constexpr, K: tl.constexpr, KEY: tl.constexpr, REMOVE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """P, R, M, N and W of one chunk and head, and the keys that it scales."""
    program = tl.program_id(0).to(tl.int64)
    bh, c = program // NC, program % NC
    row, valid = chunk_rows(bh, c, T, H, C)
    within = tl.arange(0, C)
    p_CC = tl.zeros([C, C], tl.float32)
    r_CC = tl.zeros([C, C], tl.float32)
    a_CC = tl.zeros([C, C], tl.float32)
    e_CC = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        mask = valid[:, None] & (channel < K)[None, :]
        spot = row[:, None] * K + channel[None, :]
        left, right, _, _, back, _ = chunk_powers(log, spot, mask, C, BK, KEY)
        q_CK = (load_rows(q, spot, mask) * left).to(WIDE)
        k_KC = tl.trans((load_rows(k, spot, mask) * right).to(WIDE))
        p_CC = tl.dot(q_CK, k_KC, p_CC, input_precision=PRECISION)
        if REMOVE:
            place = spot + row[:, None] * K
            a_CK = (load_rows(removal, place, mask) * left * back).to(WIDE)
            b_CK = (load_rows(removal, place + K, mask) * right).to(WIDE)
            r_CC = tl.dot(q_CK, tl.trans(b_CK), r_CC, input_precision=PRECISION)
            e_CC = tl.dot(a_CK, k_KC, e_CC, input_precision=PRECISION)
            # With its columns for rows, whose elements then scale the rows of M.
            a_CC = tl.dot(b_CK, tl.trans(a_CK), a_CC, input_precision=PRECISION)
    causal = within[:, None] >= within[None, :]
    pair = row[:, None] * C + within[None, :]
    store_rows(pairs, pair, tl.where(causal, p_CC, 0.0), valid[:, None])
    m_CC = tl.zeros([C, C], tl.float32)
    if REMOVE:
        for i in range(0, C):
            here = within == i
            a_C = tl.sum(tl.where(here[None, :] & (within < i)[:, None], a_CC, 0.0), 1)
            m_C = tl.where(here, 1.0, 0.0) - tl.sum(a_C[:, None] * m_CC, 0)
            m_CC = tl.where(here[:, None], m_C[None, :], m_CC)
        e_CC = tl.where(within[:, None] > within[None, :], e_CC, 0.0)
        store_rows(removed, pair, tl.where(causal, r_CC, 0.0), valid[:, None])
        store_rows(solved, pair, tl.dot(m_CC, e_CC, input_precision=SOLVE), valid[:, None])
        store_rows(inverse, pair, m_CC, valid[:, None])
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        mask = valid[:, None] & (channel < K)[None, :]
        spot = row[:, None] * K + channel[None, :]
        _, _, away, read, back, last = chunk_powers(log, spot, mask, C, BK, KEY)
        if KEY:
            store_rows(q_read, spot, load_rows(q, spot, mask) * read, mask)
            store_rows(k_write, spot, load_rows(k, spot, mask) * away, mask)
            tl.store(keep + program * K + channel, last, mask=channel < K)
        if REMOVE:
            place = spot + row[:, None] * K
            a_CK = load_rows(removal, place, mask) * read * back
            store_rows(a_read, spot, tl.dot(m_CC, a_CK, input_precision=SOLVE), mask)
            store_rows(b_write, spot, load_rows(removal, place + K, mask) * away, mask)


@triton.jit(do_not_specialize=["T", "NC"])
def dplr_scan(
    q_read, k_write, a_read, b_write, keep, pairs, removed, solved, v, log, u, states, state, final, o, T, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u, o and the states of one head, a block of value channels.

    A state is [V, K], so that it and what is made of it are left operands: they stay in registers.
    """
    bh, block = tl.program_id(0), tl.program_id(1)
    channel, value, within = tl.arange(0, KP), block * BV + tl.arange(0, BV), tl.arange(0, C)
    in_matrix = (value < V)[:, None] & (channel < K)[None, :]
    outer = channel[None, :] * V + value[:, None]
    head, groups = bh.to(tl.int64), tl.cdiv(NC, GROUP)
    if state is None:
        s_VK = tl.zeros([BV, KP], tl.float32)
    else:
        s_VK = tl.load(state + head * K * V + outer, mask=in_matrix, other=0.0).to(tl.float32)
    if KEY:
        kept_K = tl.load(keep + head * NC * K + channel, mask=channel < K, other=0.0)
    for c in range(0, NC):
        if c % GROUP == 0:
            group = (head * groups + c // GROUP) * K * V
            store_rows(states, group + value[:, None] * K + channel[None, :], s_VK, in_matrix)
        row, valid = chunk_rows(bh, c, T, H, C)
        in_keys = valid[:, None] & (channel < K)[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        key = row[:, None] * K + channel[None, :]
        pair = row[:, None] * C + within[None, :]
        spot = row[:, None] * V + value[None, :]
        inner, right, away, read, _, last = chunk_powers(log, spot, in_values, C, BV, VALUE)
        inner, right, away, read = tl.trans(inner), tl.trans(right), tl.trans(away), tl.trans(read)
        v_VC = tl.trans(load_rows(v, spot, in_values))
        right_VC = (v_VC * right).to(WIDE)
        q_CK = tl.load(q_read + key, mask=in_keys, other=0.0)
        p_CC = tl.load(pairs + pair, mask=valid[:, None], other=0.0).to(WIDE)
        before = s_VK.to(q_CK.dtype)
        o_VC = read * tl.dot(before, tl.trans(q_CK), input_precision=PRECISION)
        o_VC += inner * tl.dot(right_VC, tl.trans(p_CC), input_precision=WIDE_PRECISION)
        if VALUE:
            s_VK *= last[:, None]
        if KEY:
            s_VK *= kept_K[None, :]
            # That of the next chunk, so that none is waited for; only what products take comes in stages.
            after = (head * NC + c + 1) * K + channel
            kept_K = tl.load(keep + after, mask=(channel < K) & (c + 1 < NC), other=0.0)
        k_CK = tl.load(k_write + key, mask=in_keys, other=0.0)
        s_VK = tl.dot((v_VC * away).to(k_CK.dtype), k_CK, s_VK, input_precision=PRECISION)
        if REMOVE:
            w_CK = tl.load(a_read + key, mask=in_keys, other=0.0)
            b_CK = tl.load(b_write + key, mask=in_keys, other=0.0)
            n_CC = tl.load(solved + pair, mask=valid[:, None], other=0.0).to(WIDE)
            r_CC = tl.load(removed + pair, mask=valid[:, None], other=0.0).to(WIDE)
            u_VC = read * tl.dot(before, tl.trans(w_CK), input_precision=PRECISION)
            u_VC += inner * tl.dot(right_VC, tl.trans(n_CC), input_precision=WIDE_PRECISION)
            # As it is stored, and read again by backward.
            u_VC = u_VC.to(u.dtype.element_ty)
            tl.store(u + spot, tl.trans(u_VC), mask=in_values)
            u_VC = u_VC.to(tl.float32)
            o_VC -= inner * tl.dot((u_VC * right).to(WIDE), tl.trans(r_CC), input_precision=WIDE_PRECISION)
            s_VK = tl.dot((-u_VC * away).to(b_CK.dtype), b_CK, s_VK, input_precision=PRECISION)
        store_rows(o, spot, tl.trans(o_VC), in_values)
    tl.store(final + head * K * V + outer, s_VK, mask=in_matrix)
