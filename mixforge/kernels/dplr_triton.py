"""Linear recurrences of a decay and a rank-one removal in Triton, with decays of the values beside: one template.

For each head, with state S [K, V], log decays g [K] of its rows and h [V] of its columns, removal key a and strength b:

    S_t = (Diag(e^g_t) - b_t a_t^T) S_{t-1} Diag(e^h_t) + k_t v_t^T        o_t = q_t^T S_t

Removal, g and h may each be left out: `dplr` has the first two, `twofold_linear` the last two. In a chunk of 16 rows
that starts from S0, with G the running sum of g and F its first row, G~ = G - g, L the last row, the same of h as H:

    dplr_pairs    P = (q e^(G - F)) (k e^(F - G))^T, and R, A and E of (q, b), (a, b) and (a, k), those of a with G~;
                  M = (I + A)^-1, N = M E, W = M (a e^G~); q e^G, k e^(L - G) and b e^(L - G)
    dplr_scan     u = e^(H - F) (W S0 e^F + N v e^(F - H))
                  o = e^(H - F) (q e^G S0 e^F + P v e^(F - H) - R u e^(F - H))
                  S1 = e^L (S0 e^L) + (k e^(L - G))^T v e^(L - H) - (b e^(L - G))^T u e^(L - H)

and backwards, from do and the gradient of the last state:

    dplr_scan_backward    dv, dh, the gradient of the first state, and those of P, R, N, W and the three scaled keys
    dplr_gradients        dq, dk, da, db and dg of a chunk

u is what each row reads of the state, where it is removed: values and u go through the same three places. The first row
of a chunk is the anchor of all powers: nothing of a later row enters an earlier one, and with log decays of at least -5
no power passes e^75. M is made by substitution. States and sums are float32; operands of products have the dtype of v.

The states before every fourth chunk are kept for backward, which remakes those in between: K V / 64 numbers a token, as
in `chunked_linear`. All of them would be four times as many, more than all else that is kept of heads of 128 channels.
Gradients that are sums over the values are written once for each block of them, and added by the last stage.

Source: Peng et al. 2025 (arXiv 2503.14456), section 4 and appendix; Yang et al. 2023 (arXiv 2312.06635), section 4, for
chunks with decays. Departures: one template with decays of the values, which the removal reads after; the gradient is
from the equations above.
"""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.blocks import Config, choose
from mixforge.kernels.chunked_linear_triton import TYPES, check_limits, padded
from mixforge.kernels.dplr import check_dplr
from mixforge.kernels.launch import check_device, dot_precision, generation, launch, on_device, recording
from mixforge.kernels.twofold_linear import check_twofold

CHUNK = 16
GROUP = 4
"""Chunks from one kept state to the next."""


@triton.jit
def _rows(bh, c, T, H: tl.constexpr, C: tl.constexpr):
    """Rows [C] of a chunk and head among those of all tokens and heads, and which of them there are."""
    time = c * C + tl.arange(0, C)
    return ((bh // H).to(tl.int64) * T + time) * H + bh % H, time < T


@triton.jit
def _powers(log, spot, mask, C: tl.constexpr, D: tl.constexpr, HAS: tl.constexpr):
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
def _load(x, spot, mask):
    return tl.load(x + spot, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, spot, values, mask):
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
    row, valid = _rows(bh, c, T, H, C)
    within = tl.arange(0, C)
    p_CC = tl.zeros([C, C], tl.float32)
    r_CC = tl.zeros([C, C], tl.float32)
    a_CC = tl.zeros([C, C], tl.float32)
    e_CC = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        mask = valid[:, None] & (channel < K)[None, :]
        spot = row[:, None] * K + channel[None, :]
        left, right, _, _, back, _ = _powers(log, spot, mask, C, BK, KEY)
        q_CK = (_load(q, spot, mask) * left).to(WIDE)
        k_KC = tl.trans((_load(k, spot, mask) * right).to(WIDE))
        p_CC = tl.dot(q_CK, k_KC, p_CC, input_precision=PRECISION)
        if REMOVE:
            place = spot + row[:, None] * K
            a_CK = (_load(removal, place, mask) * left * back).to(WIDE)
            b_CK = (_load(removal, place + K, mask) * right).to(WIDE)
            r_CC = tl.dot(q_CK, tl.trans(b_CK), r_CC, input_precision=PRECISION)
            e_CC = tl.dot(a_CK, k_KC, e_CC, input_precision=PRECISION)
            # With its columns for rows, whose elements then scale the rows of M.
            a_CC = tl.dot(b_CK, tl.trans(a_CK), a_CC, input_precision=PRECISION)
    causal = within[:, None] >= within[None, :]
    pair = row[:, None] * C + within[None, :]
    _store(pairs, pair, tl.where(causal, p_CC, 0.0), valid[:, None])
    m_CC = tl.zeros([C, C], tl.float32)
    if REMOVE:
        for i in range(0, C):
            here = within == i
            a_C = tl.sum(tl.where(here[None, :] & (within < i)[:, None], a_CC, 0.0), 1)
            m_C = tl.where(here, 1.0, 0.0) - tl.sum(a_C[:, None] * m_CC, 0)
            m_CC = tl.where(here[:, None], m_C[None, :], m_CC)
        e_CC = tl.where(within[:, None] > within[None, :], e_CC, 0.0)
        _store(removed, pair, tl.where(causal, r_CC, 0.0), valid[:, None])
        _store(solved, pair, tl.dot(m_CC, e_CC, input_precision=SOLVE), valid[:, None])
        _store(inverse, pair, m_CC, valid[:, None])
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        mask = valid[:, None] & (channel < K)[None, :]
        spot = row[:, None] * K + channel[None, :]
        _, _, away, read, back, last = _powers(log, spot, mask, C, BK, KEY)
        if KEY:
            _store(q_read, spot, _load(q, spot, mask) * read, mask)
            _store(k_write, spot, _load(k, spot, mask) * away, mask)
            tl.store(keep + program * K + channel, last, mask=channel < K)
        if REMOVE:
            place = spot + row[:, None] * K
            a_CK = _load(removal, place, mask) * read * back
            _store(a_read, spot, tl.dot(m_CC, a_CK, input_precision=SOLVE), mask)
            _store(b_write, spot, _load(removal, place + K, mask) * away, mask)


@triton.jit
def _moved(
    s_KV, v_CV, u_CV, last, k_write, b_write, keep, chunk, channel, key, in_keys,
    K: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a chunk that writes v_CV and removes u_CV, both decayed to its end."""
    if KEY:
        s_KV *= tl.load(keep + chunk * K + channel, mask=channel < K, other=0.0)[:, None]
    if VALUE:
        s_KV *= last[None, :]
    k_CK = tl.load(k_write + key, mask=in_keys, other=0.0)
    s_KV = tl.dot(tl.trans(k_CK), v_CV.to(k_CK.dtype), s_KV, input_precision=PRECISION)
    if REMOVE:
        b_CK = tl.load(b_write + key, mask=in_keys, other=0.0)
        s_KV = tl.dot(tl.trans(b_CK), (-u_CV).to(k_CK.dtype), s_KV, input_precision=PRECISION)
    return s_KV


@triton.jit(do_not_specialize=["T", "NC"])
def dplr_scan(
    q_read, k_write, a_read, b_write, keep, pairs, removed, solved, v, log, u, states, state, final, o, T, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u, o and the states of one head, a block of value channels."""
    bh, block = tl.program_id(0), tl.program_id(1)
    channel, value, within = tl.arange(0, KP), block * BV + tl.arange(0, BV), tl.arange(0, C)
    matrix = channel[:, None] * V + value[None, :]
    in_matrix = (channel < K)[:, None] & (value < V)[None, :]
    head, groups = bh.to(tl.int64), tl.cdiv(NC, GROUP)
    if state is None:
        s_KV = tl.zeros([KP, BV], tl.float32)
    else:
        s_KV = tl.load(state + head * K * V + matrix, mask=in_matrix, other=0.0).to(tl.float32)
    for c in range(0, NC):
        if c % GROUP == 0:
            _store(states, (head * groups + c // GROUP) * K * V + matrix, s_KV, in_matrix)
        row, valid = _rows(bh, c, T, H, C)
        in_keys = valid[:, None] & (channel < K)[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        key = row[:, None] * K + channel[None, :]
        pair = row[:, None] * C + within[None, :]
        spot = row[:, None] * V + value[None, :]
        inner, right, away, read, _, last = _powers(log, spot, in_values, C, BV, VALUE)
        v_CV = _load(v, spot, in_values)
        u_CV = v_CV
        q_CK = tl.load(q_read + key, mask=in_keys, other=0.0)
        p_CC = tl.load(pairs + pair, mask=valid[:, None], other=0.0).to(WIDE)
        before = s_KV.to(q_CK.dtype)
        o_CV = read * tl.dot(q_CK, before, input_precision=PRECISION)
        o_CV += inner * tl.dot(p_CC, (v_CV * right).to(WIDE), input_precision=WIDE_PRECISION)
        if REMOVE:
            w_CK = tl.load(a_read + key, mask=in_keys, other=0.0)
            n_CC = tl.load(solved + pair, mask=valid[:, None], other=0.0).to(WIDE)
            u_CV = read * tl.dot(w_CK, before, input_precision=PRECISION)
            u_CV += inner * tl.dot(n_CC, (v_CV * right).to(WIDE), input_precision=WIDE_PRECISION)
            # As it is stored, and read again by backward.
            u_CV = u_CV.to(u.dtype.element_ty)
            tl.store(u + spot, u_CV, mask=in_values)
            u_CV = u_CV.to(tl.float32)
            r_CC = tl.load(removed + pair, mask=valid[:, None], other=0.0).to(WIDE)
            o_CV -= inner * tl.dot(r_CC, (u_CV * right).to(WIDE), input_precision=WIDE_PRECISION)
        _store(o, spot, o_CV, in_values)
        s_KV = _moved(
            s_KV, v_CV * away, u_CV * away, last, k_write, b_write, keep, head * NC + c, channel, key, in_keys,
            K, KEY, VALUE, REMOVE, PRECISION,
        )  # fmt: skip
    tl.store(final + head * K * V + matrix, s_KV, mask=in_matrix)


@triton.jit(do_not_specialize=["T", "NC", "rows"])
def dplr_scan_backward(
    q_read, k_write, a_read, b_write, keep, pairs, removed, solved, v, log, u, states, o, do, dfinal,
    dq_read, dk_write, da_read, db_write, dkeep, dpairs, dremoved, dsolved, du, dv, dlog, dstate, T, NC, rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one head from the last chunk to the first, a block of value channels: of its values and their decays,
    and its part of those of what `dplr_pairs` makes.

    No product takes a sum of products transposed, for compilers have made wrong code of that: the gradient of u goes
    through memory.
    """
    bh, block = tl.program_id(0), tl.program_id(1)
    channel, value, within = tl.arange(0, KP), block * BV + tl.arange(0, BV), tl.arange(0, C)
    matrix = channel[:, None] * V + value[None, :]
    in_matrix = (channel < K)[:, None] & (value < V)[None, :]
    head, groups, part = bh.to(tl.int64), tl.cdiv(NC, GROUP), block.to(tl.int64)
    if dfinal is None:
        ds_KV = tl.zeros([KP, BV], tl.float32)
    else:
        ds_KV = tl.load(dfinal + head * K * V + matrix, mask=in_matrix, other=0.0).to(tl.float32)
    # A load that is brought forward would read what is not written yet.
    for back in tl.range(0, NC, num_stages=1):
        c = NC - 1 - back
        group = (head * groups + c // GROUP) * K * V + matrix
        s_KV = tl.load(states + group, mask=in_matrix, other=0.0).to(tl.float32)
        for j in range(c // GROUP * GROUP, c):
            row, valid = _rows(bh, j, T, H, C)
            in_keys = valid[:, None] & (channel < K)[None, :]
            in_values = valid[:, None] & (value < V)[None, :]
            spot = row[:, None] * V + value[None, :]
            _, _, away, _, _, last = _powers(log, spot, in_values, C, BV, VALUE)
            v_CV = _load(v, spot, in_values) * away
            u_CV = v_CV
            if REMOVE:
                u_CV = _load(u, spot, in_values) * away
            s_KV = _moved(
                s_KV, v_CV, u_CV, last, k_write, b_write, keep, head * NC + j, channel,
                row[:, None] * K + channel[None, :], in_keys, K, KEY, VALUE, REMOVE, PRECISION,
            )  # fmt: skip
        row, valid = _rows(bh, c, T, H, C)
        in_values = valid[:, None] & (value < V)[None, :]
        # Keys are [K, C], as the rows of a state are key channels.
        in_keys = valid[None, :] & (channel < K)[:, None]
        key = row[None, :] * K + channel[:, None]
        pair = row[:, None] * C + within[None, :]
        turned = row[None, :] * C + within[:, None]
        spot = row[:, None] * V + value[None, :]
        part_key, part_pair = part * rows * K + key, part * rows * C + pair
        causal = within[:, None] >= within[None, :]
        inner, right, away, read, _, last = _powers(log, spot, in_values, C, BV, VALUE)
        v_CV = _load(v, spot, in_values)
        do_CV = _load(do, spot, in_values)
        k_KC = tl.load(k_write + key, mask=in_keys, other=0.0)
        before, after = s_KV.to(k_KC.dtype), ds_KV.to(k_KC.dtype)
        # P turned.
        p_CC = tl.load(pairs + turned, mask=valid[None, :], other=0.0).to(WIDE)
        inner_CV, right_CV = (do_CV * inner).to(WIDE), (v_CV * right).to(WIDE)
        dp_CC = tl.dot(inner_CV, tl.trans(right_CV), input_precision=WIDE_PRECISION)
        _store(dpairs, part_pair, tl.where(causal, dp_CC, 0.0), valid[:, None])
        v_VC = tl.trans((v_CV * away).to(k_KC.dtype))
        _store(dk_write, part_key, tl.dot(after, v_VC, input_precision=PRECISION), in_keys)
        read_CV = (do_CV * read).to(k_KC.dtype)
        _store(dq_read, part_key, tl.dot(before, tl.trans(read_CV), input_precision=PRECISION), in_keys)
        dlast_CV = away * tl.dot(tl.trans(k_KC), after, input_precision=PRECISION)
        dv_CV = dlast_CV + right * tl.dot(p_CC, inner_CV, input_precision=WIDE_PRECISION)
        if VALUE:
            along = tl.sum(v_CV * dlast_CV, 0)
            ds_KV *= last[None, :]
        if KEY or VALUE:
            kept_KV = s_KV * ds_KV
        if KEY:
            chunk = head * NC + c
            kept = tl.load(keep + chunk * K + channel, mask=channel < K, other=0.0)
            place = (part * tl.num_programs(0) * NC + chunk) * K + channel
            tl.store(dkeep + place, tl.sum(kept_KV, 1), mask=channel < K)
            kept_KV *= kept[:, None]
            ds_KV *= kept[:, None]
        if VALUE:
            along += tl.sum(kept_KV, 0)
        q_KC = tl.load(q_read + key, mask=in_keys, other=0.0)
        ds_KV = tl.dot(q_KC, read_CV, ds_KV, input_precision=PRECISION)
        if REMOVE:
            b_KC = tl.load(b_write + key, mask=in_keys, other=0.0)
            # R and N turned.
            r_CC = tl.load(removed + turned, mask=valid[None, :], other=0.0).to(WIDE)
            n_CC = tl.load(solved + turned, mask=valid[None, :], other=0.0).to(WIDE)
            u_CV = _load(u, spot, in_values)
            dr_CC = tl.dot(inner_CV, tl.trans((-u_CV * right).to(WIDE)), input_precision=WIDE_PRECISION)
            _store(dremoved, part_pair, tl.where(causal, dr_CC, 0.0), valid[:, None])
            u_VC = tl.trans((-u_CV * away).to(k_KC.dtype))
            _store(db_write, part_key, tl.dot(after, u_VC, input_precision=PRECISION), in_keys)
            dlast_CV = away * tl.dot(tl.trans(b_KC), after, input_precision=PRECISION)
            if VALUE:
                along -= tl.sum(u_CV * dlast_CV, 0)
            du_CV = -dlast_CV - right * tl.dot(r_CC, inner_CV, input_precision=WIDE_PRECISION)
            inner_CV, read_CV = (du_CV * inner).to(WIDE), (du_CV * read).to(k_KC.dtype)
            dn_CC = tl.dot(inner_CV, tl.trans(right_CV), input_precision=WIDE_PRECISION)
            _store(dsolved, part_pair, tl.where(causal, dn_CC, 0.0), valid[:, None])
            dv_CV += right * tl.dot(n_CC, inner_CV, input_precision=WIDE_PRECISION)
            tl.store(du + spot, read_CV, mask=in_values)
            tl.debug_barrier()
            read_VC = tl.load(
                du + row[None, :] * V + value[:, None], mask=valid[None, :] & (value < V)[:, None], other=0.0
            )
            _store(da_read, part_key, tl.dot(before, read_VC, input_precision=PRECISION), in_keys)
            w_KC = tl.load(a_read + key, mask=in_keys, other=0.0)
            ds_KV = tl.dot(w_KC, read_CV, ds_KV, input_precision=PRECISION)
        _store(dv, spot, dv_CV, in_values)
        if VALUE:
            dh_CV = do_CV * _load(o, spot, in_values) - v_CV * dv_CV
            dh_CV += tl.where((within == C - 1)[:, None], along[None, :], 0.0)
            tl.store(dlog + spot, tl.cumsum(dh_CV, 0, reverse=True), mask=in_values)
    tl.store(dstate + head * K * V + matrix, ds_KV, mask=in_matrix)


@triton.jit
def _sum(x, spot, part, mask, PARTS: tl.constexpr):
    """The sum of a gradient's parts."""
    total = _load(x, spot, mask)
    for n in range(1, PARTS):
        total += _load(x, n * part + spot, mask)
    return total


@triton.jit(do_not_specialize=["T", "NC", "rows"])
def dplr_gradients(
    q, k, removal, log, keep, a_read, solved, inverse, dq_read, dk_write, da_read, db_write, dkeep, dpairs, dremoved,
    dsolved, dq, dk, dremoval, dlog, T, NC, rows,
    H: tl.constexpr, K: tl.constexpr, KEY: tl.constexpr, REMOVE: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    BK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db and dg of one chunk and head. With M' and N' for M and N turned, dE = M' dN and
    dA = -M' (dW W' + dN N'), below the diagonal."""
    program = tl.program_id(0).to(tl.int64)
    bh, c = program // NC, program % NC
    row, valid = _rows(bh, c, T, H, C)
    within = tl.arange(0, C)
    pair = row[:, None] * C + within[None, :]
    turned = row[None, :] * C + within[:, None]
    part, all_pairs = rows.to(tl.int64) * K, rows.to(tl.int64) * C
    dp_CC = _sum(dpairs, pair, all_pairs, valid[:, None], PARTS).to(WIDE)
    # What is turned is loaded or made so: no product takes a sum of products that is turned.
    dp_turned = _sum(dpairs, turned, all_pairs, valid[None, :], PARTS).to(WIDE)
    if REMOVE:
        da_CC = tl.zeros([C, C], tl.float32)
        da_turned = tl.zeros([C, C], tl.float32)
        for start in range(0, K, BK):
            channel = start + tl.arange(0, BK)
            mask = valid[:, None] & (channel < K)[None, :]
            spot = row[:, None] * K + channel[None, :]
            w_CK = _load(a_read, spot, mask)
            dw_CK = _sum(da_read, spot, part, mask, PARTS)
            da_CC = tl.dot(dw_CK, tl.trans(w_CK), da_CC, input_precision=SOLVE)
            da_turned = tl.dot(w_CK, tl.trans(dw_CK), da_turned, input_precision=SOLVE)
        dn_CC = _sum(dsolved, pair, all_pairs, valid[:, None], PARTS)
        dn_turned = _sum(dsolved, turned, all_pairs, valid[None, :], PARTS)
        n_CC, n_turned = _load(solved, pair, valid[:, None]), _load(solved, turned, valid[None, :])
        m_CC, m_turned = _load(inverse, pair, valid[:, None]), _load(inverse, turned, valid[None, :])
        da_CC = tl.dot(m_turned, tl.dot(dn_CC, n_turned, da_CC, input_precision=SOLVE), input_precision=SOLVE)
        da_turned = tl.dot(n_CC, dn_turned, da_turned, input_precision=SOLVE)
        da_turned = tl.dot(da_turned, m_CC, input_precision=SOLVE)
        de_CC = tl.dot(m_turned, dn_CC, input_precision=SOLVE)
        de_turned = tl.dot(dn_turned, m_CC, input_precision=SOLVE)
        below, above = within[:, None] > within[None, :], within[:, None] < within[None, :]
        da_CC = tl.where(below, -da_CC, 0.0).to(WIDE)
        de_CC = tl.where(below, de_CC, 0.0).to(WIDE)
        da_turned = tl.where(above, -da_turned, 0.0).to(WIDE)
        de_turned = tl.where(above, de_turned, 0.0).to(WIDE)
        dr_CC = _sum(dremoved, pair, all_pairs, valid[:, None], PARTS).to(WIDE)
        dr_turned = _sum(dremoved, turned, all_pairs, valid[None, :], PARTS).to(WIDE)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        mask = valid[:, None] & (channel < K)[None, :]
        spot = row[:, None] * K + channel[None, :]
        left, right, away, read, back, _ = _powers(log, spot, mask, C, BK, KEY)
        q_CK, k_CK = _load(q, spot, mask), _load(k, spot, mask)
        q_left, k_right = (q_CK * left).to(WIDE), (k_CK * right).to(WIDE)
        dq_left = tl.dot(dp_CC, k_right, input_precision=PRECISION)
        dk_right = tl.dot(dp_turned, q_left, input_precision=PRECISION)
        dk_away = away * _sum(dk_write, spot, part, mask, PARTS)
        if KEY:
            along = tl.sum(k_CK * dk_away, 0)
        if REMOVE:
            place = spot + row[:, None] * K
            a_CK, b_CK = _load(removal, place, mask), _load(removal, place + K, mask)
            a_left, b_right = (a_CK * left * back).to(WIDE), (b_CK * right).to(WIDE)
            dq_left = tl.dot(dr_CC, b_right, dq_left, input_precision=PRECISION)
            dk_right = tl.dot(de_turned, a_left, dk_right, input_precision=PRECISION)
            da_left = tl.dot(da_CC, b_right, input_precision=PRECISION)
            da_left = tl.dot(de_CC, k_right, da_left, input_precision=PRECISION)
            db_right = tl.dot(dr_turned, q_left, input_precision=PRECISION)
            db_right = tl.dot(da_turned, a_left, db_right, input_precision=PRECISION)
            dw_CK = _sum(da_read, spot, part, mask, PARTS)
            da_CK = back * (left * da_left + read * tl.dot(m_turned, dw_CK, input_precision=SOLVE))
            db_away = away * _sum(db_write, spot, part, mask, PARTS)
            db_CK = right * db_right + db_away
            _store(dremoval, place, da_CK, mask)
            _store(dremoval, place + K, db_CK, mask)
        dq_CK = left * dq_left + read * _sum(dq_read, spot, part, mask, PARTS)
        dk_CK = right * dk_right + dk_away
        _store(dq, spot, dq_CK, mask)
        _store(dk, spot, dk_CK, mask)
        if KEY:
            dg_CK = q_CK * dq_CK - k_CK * dk_CK
            chunks = (rows // T).to(tl.int64) * NC * K
            dkept_K = _sum(dkeep, program * K + channel, chunks, channel < K, PARTS)
            along += dkept_K * tl.load(keep + program * K + channel, mask=channel < K, other=0.0)
            if REMOVE:
                # a is scaled by the sum before its row.
                dg_CK += a_CK * da_CK - b_CK * db_CK
                along += tl.sum(b_CK * db_away, 0)
            dg_CK += tl.where((within == C - 1)[:, None], along[None, :], 0.0)
            dg_CK = tl.cumsum(dg_CK, 0, reverse=True)
            if REMOVE:
                dg_CK -= a_CK * da_CK
            tl.store(dlog + spot, dg_CK, mask=mask)


class Shape:
    """What every launch of one call has in common."""

    def __init__(
        self, q: Tensor, v: Tensor, decay: Tensor | None, value_decay: Tensor | None, removal: Tensor | None
    ) -> None:
        self.batch, self.length, self.heads, self.keys = q.shape
        self.values, self.dtype = v.shape[3], v.dtype
        self.chunks = -(-self.length // CHUNK)
        self.groups = -(-self.chunks // GROUP)
        self.rows = self.batch * self.length * self.heads
        self.flags = {
            "KEY": decay is not None,
            "VALUE": value_decay is not None,
            "REMOVE": removal is not None,
        }
        self.precision = self.wide_precision = dot_precision(v.dtype)
        self.wide = v.dtype
        # Powers up to e^75 are beyond float16; its mantissa is that of TF32.
        if v.dtype == torch.float16 and (decay is not None or value_decay is not None):
            self.wide, self.wide_precision = torch.float32, self.solve_precision

    @property
    def solve_precision(self) -> str:
        """Of products of float32 around the system, which has no more digits than what it is made of."""
        if self.dtype == torch.float32:
            return dot_precision(torch.float32)
        return "tf32" if generation().startswith("sm_") else "ieee"

    def run_chunks(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """One program for each chunk and head."""
        found = choose(kernel.fn.__name__, generation(), self.dtype, self.keys, self.values)
        config = replace(found, blocks={"BK": min(found.blocks["BK"], padded(self.keys))})
        launch(
            kernel, (self.batch * self.heads * self.chunks,), *args, config=config,
            H=self.heads, K=self.keys, KEY=self.flags["KEY"], REMOVE=self.flags["REMOVE"], C=CHUNK,
            WIDE=TYPES[self.wide], PRECISION=self.wide_precision, SOLVE=self.solve_precision, **constants,
        )  # fmt: skip

    def scan_config(self, kernel: Any) -> Config:
        found = choose(kernel.fn.__name__, generation(), self.dtype, self.keys, self.values)
        return replace(found, blocks={"BV": min(found.blocks["BV"], padded(self.values))})

    def run_scan(self, kernel: Any, *args: Any) -> None:
        """One program for each head and block of value channels."""
        config = self.scan_config(kernel)
        launch(
            kernel, (self.batch * self.heads, -(-self.values // config.blocks["BV"])), *args, config=config,
            H=self.heads, K=self.keys, V=self.values, **self.flags, C=CHUNK, GROUP=GROUP, KP=padded(self.keys),
            WIDE=TYPES[self.wide], WIDE_PRECISION=self.wide_precision, PRECISION=self.precision,
        )  # fmt: skip


def forward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    removal: Tensor | None,
    state: Tensor | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """o, the last state, and what backward needs: q, k, W and b as `dplr_pairs` scales them, e^L, P, R, N, M, u and the
    states before the groups.

    What has none is empty.
    """
    check_device(q=q, k=k, v=v, decay=decay, value_decay=value_decay, removal=removal, state=state)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    decay, value_decay, removal, state = (
        None if x is None else x.contiguous() for x in (decay, value_decay, removal, state)
    )
    shape = Shape(q, v, decay, value_decay, removal)
    cells = (shape.batch, shape.length, shape.heads)
    per_head = (shape.batch * shape.heads,)
    has_key, _, removes = shape.flags.values()
    q_read, k_write = (torch.empty_like(q) if has_key else None for _ in range(2))
    a_read, b_write = (torch.empty_like(q) if removes else None for _ in range(2))
    keep = q.new_empty(*per_head, shape.chunks, shape.keys, dtype=torch.float32) if has_key else None
    pairs = q.new_empty(*cells, CHUNK)
    removed, solved, inverse = (torch.empty_like(pairs) if removes else None for _ in range(3))
    made = (q_read, k_write, a_read, b_write, keep, pairs, removed, solved)
    shape.run_chunks(dplr_pairs, q, k, removal, decay, *made, inverse, shape.length, shape.chunks)
    u = torch.empty_like(v) if removes else None
    states = q.new_empty(*per_head, shape.groups, shape.keys, shape.values)
    final = q.new_empty(shape.batch, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    o = torch.empty_like(v)
    scaled = (q, k) if q_read is None else (q_read, k_write)
    shape.run_scan(
        dplr_scan, *scaled, *made[2:], v, value_decay, u, states, state, final, o, shape.length, shape.chunks
    )
    # An operation of torch returns tensors: what there is not is empty.
    return o, final, *(_or_empty(q, x) for x in (*made, inverse, u, states))  # type: ignore[return-value]


def backward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    removal: Tensor | None,
    q_read: Tensor,
    k_write: Tensor,
    a_read: Tensor,
    b_write: Tensor,
    keep: Tensor,
    pairs: Tensor,
    removed: Tensor,
    solved: Tensor,
    inverse: Tensor,
    u: Tensor,
    states: Tensor,
    o: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the decays, what is removed and the first state, from those of o and the last state.

    What has none is empty.
    """
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    decay, value_decay, removal, dfinal = (
        None if x is None else x.contiguous() for x in (decay, value_decay, removal, dfinal)
    )
    shape = Shape(q, v, decay, value_decay, removal)
    has_key, has_value, removes = shape.flags.values()
    scaled = (q_read, k_write) if has_key else (q, k)
    w, b, dropped, n, m, kept_u = (
        x if removes else None for x in (a_read, b_write, removed, solved, inverse, u)
    )
    kept_keep = keep if has_key else None
    parts = -(-shape.values // shape.scan_config(dplr_scan_backward).blocks["BV"])
    dq_read, dk_write = (q.new_empty(parts, *q.shape) for _ in range(2))
    da_read, db_write = (torch.empty_like(dq_read) if removes else None for _ in range(2))
    dkeep = keep.new_empty(parts, *keep.shape) if has_key else None
    dpairs = q.new_empty(parts, *q.shape[:3], CHUNK, dtype=shape.wide)
    dremoved, dsolved = (torch.empty_like(dpairs) if removes else None for _ in range(2))
    made = (dq_read, dk_write, da_read, db_write, dkeep, dpairs, dremoved, dsolved)
    dv = torch.empty_like(v)
    du = torch.empty_like(v) if removes else None
    dvalue_decay = None if value_decay is None else torch.empty_like(value_decay)
    dstate = q.new_empty(shape.batch, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    ends = (shape.length, shape.chunks, shape.rows)
    shape.run_scan(
        dplr_scan_backward, *scaled, w, b, kept_keep, pairs, dropped, n, v, value_decay, kept_u, states,
        o if has_value else None, do, dfinal, *made, du, dv, dvalue_decay, dstate, *ends,
    )  # fmt: skip
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dremoval = None if removal is None else torch.empty_like(removal)
    ddecay = None if decay is None else torch.empty_like(decay)
    shape.run_chunks(
        dplr_gradients, q, k, removal, decay, kept_keep, w, n, m, *made, dq, dk, dremoval, ddecay,
        *ends, PARTS=parts,
    )  # fmt: skip
    return dq, dk, dv, *(_or_empty(q, x) for x in (ddecay, dvalue_decay, dremoval)), dstate  # type: ignore[return-value]


def _or_empty(like: Tensor, x: Tensor | None) -> Tensor:
    return like.new_empty(0) if x is None else x


forward = torch.library.custom_op("mixforge::dplr_forward", on_device(forward_kernels), mutates_args=())
backward = torch.library.custom_op("mixforge::dplr_backward", on_device(backward_kernels), mutates_args=())


@forward.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return forward_kernels(*args)


@backward.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return backward_kernels(*args)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    has_values = inputs[4] is not None
    # Only decays of values need the outputs.
    o = output[0] if has_values else output[0].new_empty(0)
    ctx.save_for_backward(*inputs[:6], *output[2:], o)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    do, dfinal = grads[:2]
    given = ctx.saved_tensors[:6]
    do = torch.zeros_like(given[2]) if do is None else do
    found = backward(*ctx.saved_tensors, do, dfinal)
    of_inputs = (None if x is None else grad for x, grad in zip(given, found[:6], strict=True))
    return *of_inputs, found[6] if ctx.needs_input_grad[6] else None


forward.register_autograd(_gradients, setup_context=_keep)


def dplr_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor | None,
    removal_BTHRK: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `dplr.dplr_reference`, on a GPU; the state is float32. Raises ValueError where a shape, dtype or device does
    not fit."""
    check_inputs(q_BTHK, k_BTHK, v_BTHV, removal_BTHRK, state_BHKV)
    check_dplr(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, removal_BTHRK)
    return _run(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, None, removal_BTHRK, state_BHKV)


def twofold_linear_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor,
    value_decay_BTHV: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `twofold_linear.twofold_linear_reference`, on a GPU; the state is float32. Raises ValueError where a shape,
    dtype or device does not fit."""
    check_inputs(q_BTHK, k_BTHK, v_BTHV, None, state_BHKV)
    check_twofold(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, value_decay_BTHV)
    return _run(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, value_decay_BTHV, None, state_BHKV)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    removal: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    decay, value_decay, state = (None if x is None else x.float() for x in (decay, value_decay, state))
    o, last, *_ = forward(q, k, v, decay, value_decay, removal, state)
    return o, last


def check_inputs(q: Tensor, k: Tensor, v: Tensor, removal: Tensor | None, state: Tensor | None) -> None:
    """Raise ValueError for a dtype or a dim that the kernels do not take, or a state that does not fit."""
    for name, given in (("q", q), ("k", k), ("v", v)):
        if given.dim() != 4:
            raise ValueError(f"{name} has shape {list(given.shape)}; it must be [batch, time, heads, dim]")
        if given.dtype != v.dtype:
            raise ValueError(f"{name} is {given.dtype} and v is {v.dtype}; they must have one dtype")
    check_limits(q)
    if q.shape[1] == 0:
        raise ValueError("q has a length of 0; there must be at least one token")
    if removal is not None and removal.dtype not in TYPES:
        raise ValueError(
            f"removal is {removal.dtype}; backend='triton' takes that of v, {v.dtype}, or float32"
        )
    wanted = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if state is not None and state.shape != wanted:
        raise ValueError(f"state has shape {list(state.shape)}; it must be {list(wanted)}")
