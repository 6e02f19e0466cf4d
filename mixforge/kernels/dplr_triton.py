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

    dplr_scan_backward     du = -e^(L - H) b e^(L - G) dS1 - e^(F - H) R^T do e^(H - F)
                           dv = e^(L - H) k e^(L - G) dS1 + e^(F - H) (P^T do e^(H - F) + N^T du e^(H - F))
                           dS0 = e^L (dS1 e^L) + (q e^G)^T do e^H + W^T du e^H
    dplr_pairs_backward    the gradients of P, R, N, W and the three scaled keys, from S0, dS1, do, du, v and u
    dplr_gradients         dq, dk, da, db and dg

u is what each row reads of the state, where it is removed: values and u go through the same three places. The first row
of a chunk is the anchor of all powers: nothing of a later row enters an earlier one, and with log decays of at least -5
no power passes e^75. M is made by substitution. States and sums are float32; operands of products have the dtype of v.

The states before every fourth chunk are kept for backward, which remakes those in between: K V / 64 numbers a token, as
in `chunked_linear`. All of them would be four times as many, more than all else that is kept of heads of 128 channels.
Backward only the gradient of the state goes from chunk to chunk, and is stored after each of them; all else is made of
each chunk by itself. No product takes a sum of products transposed, for compilers have made wrong code of that.

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
            _store(states, group + value[:, None] * K + channel[None, :], s_VK, in_matrix)
        row, valid = _rows(bh, c, T, H, C)
        in_keys = valid[:, None] & (channel < K)[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        key = row[:, None] * K + channel[None, :]
        pair = row[:, None] * C + within[None, :]
        spot = row[:, None] * V + value[None, :]
        inner, right, away, read, _, last = _powers(log, spot, in_values, C, BV, VALUE)
        inner, right, away, read = tl.trans(inner), tl.trans(right), tl.trans(away), tl.trans(read)
        v_VC = tl.trans(_load(v, spot, in_values))
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
        _store(o, spot, tl.trans(o_VC), in_values)
    tl.store(final + head * K * V + outer, s_VK, mask=in_matrix)


@triton.jit(do_not_specialize=["T", "NC"])
def dplr_scan_backward(
    q_read, k_write, a_read, b_write, keep, pairs, removed, solved, v, log, u, o, do, dfinal,
    dstates, du, dv, dlog, dstate, T, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the values, of u and of the states of one head from the last chunk to the first, a block of value
    channels; and of the decays of the values all but what they keep of the state before a chunk.

    The gradient of a state is [V, K], so that it and what is made of it are left operands: they stay in registers.
    """
    bh, block = tl.program_id(0), tl.program_id(1)
    channel, value, within = tl.arange(0, KP), block * BV + tl.arange(0, BV), tl.arange(0, C)
    in_matrix = (value < V)[:, None] & (channel < K)[None, :]
    outer = channel[None, :] * V + value[:, None]
    head = bh.to(tl.int64)
    if dfinal is None:
        ds_VK = tl.zeros([BV, KP], tl.float32)
    else:
        ds_VK = tl.load(dfinal + head * K * V + outer, mask=in_matrix, other=0.0).to(tl.float32)
    if KEY:
        kept_K = tl.load(keep + (head * NC + NC - 1) * K + channel, mask=channel < K, other=0.0)
    for back in range(0, NC):
        c = NC - 1 - back
        chunk = head * NC + c
        row, valid = _rows(bh, c, T, H, C)
        in_keys = valid[:, None] & (channel < K)[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        key = row[:, None] * K + channel[None, :]
        pair = row[:, None] * C + within[None, :]
        spot = row[:, None] * V + value[None, :]
        inner, right, away, read, _, last = _powers(log, spot, in_values, C, BV, VALUE)
        inner, right, away, read = tl.trans(inner), tl.trans(right), tl.trans(away), tl.trans(read)
        k_CK = tl.load(k_write + key, mask=in_keys, other=0.0)
        after = ds_VK.to(k_CK.dtype)
        tl.store(dstates + chunk * K * V + value[:, None] * K + channel[None, :], after, mask=in_matrix)
        do_VC = tl.trans(_load(do, spot, in_values))
        inner_VC, read_VC = (do_VC * inner).to(WIDE), (do_VC * read).to(k_CK.dtype)
        p_CC = tl.load(pairs + pair, mask=valid[:, None], other=0.0).to(WIDE)
        dlast_VC = away * tl.dot(after, tl.trans(k_CK), input_precision=PRECISION)
        dv_VC = dlast_VC + right * tl.dot(inner_VC, p_CC, input_precision=WIDE_PRECISION)
        if VALUE:
            v_VC = tl.trans(_load(v, spot, in_values))
            along = tl.sum(v_VC * dlast_VC, 1)
            ds_VK *= last[:, None]
        if KEY:
            ds_VK *= kept_K[None, :]
            # That of the chunk before, so that none is waited for; only what products take comes in stages.
            kept_K = tl.load(keep + (chunk - 1) * K + channel, mask=(channel < K) & (c > 0), other=0.0)
        q_CK = tl.load(q_read + key, mask=in_keys, other=0.0)
        ds_VK = tl.dot(read_VC, q_CK, ds_VK, input_precision=PRECISION)
        if REMOVE:
            b_CK = tl.load(b_write + key, mask=in_keys, other=0.0)
            w_CK = tl.load(a_read + key, mask=in_keys, other=0.0)
            r_CC = tl.load(removed + pair, mask=valid[:, None], other=0.0).to(WIDE)
            n_CC = tl.load(solved + pair, mask=valid[:, None], other=0.0).to(WIDE)
            dlast_VC = away * tl.dot(after, tl.trans(b_CK), input_precision=PRECISION)
            if VALUE:
                along -= tl.sum(tl.trans(_load(u, spot, in_values)) * dlast_VC, 1)
            du_VC = -dlast_VC - right * tl.dot(inner_VC, r_CC, input_precision=WIDE_PRECISION)
            # As it is stored, and read again.
            du_VC = du_VC.to(du.dtype.element_ty)
            tl.store(du + spot, tl.trans(du_VC), mask=in_values)
            du_VC = du_VC.to(tl.float32)
            dv_VC += right * tl.dot((du_VC * inner).to(WIDE), n_CC, input_precision=WIDE_PRECISION)
            ds_VK = tl.dot((du_VC * read).to(k_CK.dtype), w_CK, ds_VK, input_precision=PRECISION)
        _store(dv, spot, tl.trans(dv_VC), in_values)
        if VALUE:
            dh_VC = do_VC * tl.trans(_load(o, spot, in_values)) - v_VC * dv_VC
            dh_VC += tl.where((within == C - 1)[None, :], along[:, None], 0.0)
            tl.store(dlog + spot, tl.trans(tl.cumsum(dh_VC, 1, reverse=True)), mask=in_values)
    tl.store(dstate + head * K * V + outer, ds_VK, mask=in_matrix)


@triton.jit
def _moved(
    s_KV, k_write, b_write, keep, v, log, u, bh, c, channel, value, T, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a chunk, from that before it."""
    row, valid = _rows(bh, c, T, H, C)
    in_keys = valid[:, None] & (channel < K)[None, :]
    in_values = valid[:, None] & (value < V)[None, :]
    key = row[:, None] * K + channel[None, :]
    spot = row[:, None] * V + value[None, :]
    v_CV = _load(v, spot, in_values)
    k_CK = tl.load(k_write + key, mask=in_keys, other=0.0)
    if REMOVE:
        u_CV = _load(u, spot, in_values)
        b_CK = tl.load(b_write + key, mask=in_keys, other=0.0)
    if KEY:
        s_KV *= tl.load(keep + (bh * NC + c) * K + channel, mask=channel < K, other=0.0)[:, None]
    _, _, away, _, _, last = _powers(log, spot, in_values, C, BV, VALUE)
    if VALUE:
        s_KV *= last[None, :]
    s_KV = tl.dot(tl.trans(k_CK), (v_CV * away).to(k_CK.dtype), s_KV, input_precision=PRECISION)
    if REMOVE:
        s_KV = tl.dot(tl.trans(b_CK), (-u_CV * away).to(k_CK.dtype), s_KV, input_precision=PRECISION)
    return s_KV


@triton.jit(do_not_specialize=["T", "NC"])
def dplr_pairs_backward(
    k_write, b_write, keep, v, log, u, states, do, dstates, du,
    dq_read, dk_write, da_read, db_write, dkeep, dpairs, dremoved, dsolved, dlog, T, NC,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what `dplr_pairs` makes of one chunk and head, and the rest of those of the decays of its values."""
    program = tl.program_id(0).to(tl.int64)
    bh, c = program // NC, program % NC
    within = tl.arange(0, C)
    row, valid = _rows(bh, c, T, H, C)
    dp_CC = tl.zeros([C, C], tl.float32)
    dr_CC = tl.zeros([C, C], tl.float32)
    dn_CC = tl.zeros([C, C], tl.float32)
    for first in range(0, V, BV):
        value = first + tl.arange(0, BV)
        in_values = valid[:, None] & (value < V)[None, :]
        spot = row[:, None] * V + value[None, :]
        inner, right, _, _, _, _ = _powers(log, spot, in_values, C, BV, VALUE)
        inner_CV = (_load(do, spot, in_values) * inner).to(WIDE)
        right_VC = tl.trans((_load(v, spot, in_values) * right).to(WIDE))
        dp_CC = tl.dot(inner_CV, right_VC, dp_CC, input_precision=WIDE_PRECISION)
        if REMOVE:
            u_VC = tl.trans((-_load(u, spot, in_values) * right).to(WIDE))
            dr_CC = tl.dot(inner_CV, u_VC, dr_CC, input_precision=WIDE_PRECISION)
            du_CV = (_load(du, spot, in_values) * inner).to(WIDE)
            dn_CC = tl.dot(du_CV, right_VC, dn_CC, input_precision=WIDE_PRECISION)
    causal = within[:, None] >= within[None, :]
    pair = row[:, None] * C + within[None, :]
    _store(dpairs, pair, tl.where(causal, dp_CC, 0.0), valid[:, None])
    if REMOVE:
        _store(dremoved, pair, tl.where(causal, dr_CC, 0.0), valid[:, None])
        _store(dsolved, pair, tl.where(causal, dn_CC, 0.0), valid[:, None])
    for start in tl.range(0, K, BK, num_stages=1):
        channel = start + tl.arange(0, BK)
        dq_KC = tl.zeros([BK, C], tl.float32)
        dk_KC = tl.zeros([BK, C], tl.float32)
        da_KC = tl.zeros([BK, C], tl.float32)
        db_KC = tl.zeros([BK, C], tl.float32)
        dkept_K = tl.zeros([BK], tl.float32)
        for first in tl.range(0, V, BV, num_stages=1):
            value = first + tl.arange(0, BV)
            matrix = value[:, None] * K + channel[None, :]
            in_matrix = (value < V)[:, None] & (channel < K)[None, :]
            in_values = valid[:, None] & (value < V)[None, :]
            spot = row[:, None] * V + value[None, :]
            group = (bh * tl.cdiv(NC, GROUP) + c // GROUP) * K * V
            # All that is loaded of the chunk comes before the first wait.
            s_KV = tl.trans(_load(states, group + matrix, in_matrix))
            after = tl.trans(tl.load(dstates + program * K * V + matrix, mask=in_matrix, other=0.0))
            v_CV, do_CV = _load(v, spot, in_values), _load(do, spot, in_values)
            if REMOVE:
                u_CV, du_CV = _load(u, spot, in_values), _load(du, spot, in_values)
            _, _, away, read, _, last = _powers(log, spot, in_values, C, BV, VALUE)
            v_VC = tl.trans((v_CV * away).to(after.dtype))
            do_VC = tl.trans((do_CV * read).to(after.dtype))
            dk_KC = tl.dot(after, v_VC, dk_KC, input_precision=PRECISION)
            if REMOVE:
                u_VC = tl.trans((-u_CV * away).to(after.dtype))
                du_VC = tl.trans((du_CV * read).to(after.dtype))
                db_KC = tl.dot(after, u_VC, db_KC, input_precision=PRECISION)
            for j in range(c // GROUP * GROUP, c):
                s_KV = _moved(
                    s_KV, k_write, b_write, keep, v, log, u, bh, j, channel, value, T, NC,
                    H, K, V, KEY, VALUE, REMOVE, C, BV, PRECISION,
                )  # fmt: skip
            before = s_KV.to(after.dtype)
            dq_KC = tl.dot(before, do_VC, dq_KC, input_precision=PRECISION)
            if REMOVE:
                da_KC = tl.dot(before, du_VC, da_KC, input_precision=PRECISION)
            if KEY or VALUE:
                kept_KV = s_KV * after.to(tl.float32)
            if VALUE:
                kept_KV *= last[None, :]
            if KEY:
                dkept_K += tl.sum(kept_KV, 1)
            if VALUE:
                if KEY:
                    kept_KV *= tl.load(keep + program * K + channel, mask=channel < K, other=0.0)[:, None]
                dh_CV = tl.load(dlog + spot, mask=in_values, other=0.0) + tl.sum(kept_KV, 0)[None, :]
                tl.store(dlog + spot, dh_CV, mask=in_values)
        # Keys are [K, C], as the rows of a state are key channels.
        in_keys = (channel < K)[:, None] & valid[None, :]
        key = row[None, :] * K + channel[:, None]
        _store(dq_read, key, dq_KC, in_keys)
        _store(dk_write, key, dk_KC, in_keys)
        if REMOVE:
            _store(da_read, key, da_KC, in_keys)
            _store(db_write, key, db_KC, in_keys)
        if KEY:
            tl.store(dkeep + program * K + channel, dkept_K, mask=channel < K)


@triton.jit(do_not_specialize=["T", "NC"])
def dplr_gradients(
    q, k, removal, log, keep, a_read, solved, inverse, dq_read, dk_write, da_read, db_write, dkeep, dpairs, dremoved,
    dsolved, dq, dk, dremoval, dlog, T, NC,
    H: tl.constexpr, K: tl.constexpr, KEY: tl.constexpr, REMOVE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db and dg of one chunk and head. With M' and N' for M and N turned, dE = M' dN and
    dA = -M' (dW W' + dN N'), below the diagonal."""
    program = tl.program_id(0).to(tl.int64)
    bh, c = program // NC, program % NC
    row, valid = _rows(bh, c, T, H, C)
    within = tl.arange(0, C)
    pair = row[:, None] * C + within[None, :]
    turned = row[None, :] * C + within[:, None]
    dp_CC = _load(dpairs, pair, valid[:, None]).to(WIDE)
    # What is turned is loaded or made so: no product takes a sum of products that is turned.
    dp_turned = _load(dpairs, turned, valid[None, :]).to(WIDE)
    if REMOVE:
        da_CC = tl.zeros([C, C], tl.float32)
        da_turned = tl.zeros([C, C], tl.float32)
        for start in range(0, K, BK):
            channel = start + tl.arange(0, BK)
            mask = valid[:, None] & (channel < K)[None, :]
            spot = row[:, None] * K + channel[None, :]
            w_CK = _load(a_read, spot, mask)
            dw_CK = _load(da_read, spot, mask)
            da_CC = tl.dot(dw_CK, tl.trans(w_CK), da_CC, input_precision=SOLVE)
            da_turned = tl.dot(w_CK, tl.trans(dw_CK), da_turned, input_precision=SOLVE)
        dn_CC = _load(dsolved, pair, valid[:, None])
        dn_turned = _load(dsolved, turned, valid[None, :])
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
        dr_CC = _load(dremoved, pair, valid[:, None]).to(WIDE)
        dr_turned = _load(dremoved, turned, valid[None, :]).to(WIDE)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        mask = valid[:, None] & (channel < K)[None, :]
        spot = row[:, None] * K + channel[None, :]
        # All that is loaded comes before the first wait.
        q_CK, k_CK = _load(q, spot, mask), _load(k, spot, mask)
        dread_CK, dwrite_CK = _load(dq_read, spot, mask), _load(dk_write, spot, mask)
        if REMOVE:
            place = spot + row[:, None] * K
            a_CK, b_CK = _load(removal, place, mask), _load(removal, place + K, mask)
            dw_CK, dbwrite_CK = _load(da_read, spot, mask), _load(db_write, spot, mask)
        if KEY:
            kept_K = tl.load(keep + program * K + channel, mask=channel < K, other=0.0)
            dkept_K = tl.load(dkeep + program * K + channel, mask=channel < K, other=0.0)
        left, right, away, read, back, _ = _powers(log, spot, mask, C, BK, KEY)
        q_left, k_right = (q_CK * left).to(WIDE), (k_CK * right).to(WIDE)
        dq_left = tl.dot(dp_CC, k_right, input_precision=PRECISION)
        dk_right = tl.dot(dp_turned, q_left, input_precision=PRECISION)
        dk_away = away * dwrite_CK
        if KEY:
            along = tl.sum(k_CK * dk_away, 0)
        if REMOVE:
            a_left, b_right = (a_CK * left * back).to(WIDE), (b_CK * right).to(WIDE)
            dq_left = tl.dot(dr_CC, b_right, dq_left, input_precision=PRECISION)
            dk_right = tl.dot(de_turned, a_left, dk_right, input_precision=PRECISION)
            da_left = tl.dot(da_CC, b_right, input_precision=PRECISION)
            da_left = tl.dot(de_CC, k_right, da_left, input_precision=PRECISION)
            db_right = tl.dot(dr_turned, q_left, input_precision=PRECISION)
            db_right = tl.dot(da_turned, a_left, db_right, input_precision=PRECISION)
            da_CK = back * (left * da_left + read * tl.dot(m_turned, dw_CK, input_precision=SOLVE))
            db_away = away * dbwrite_CK
            db_CK = right * db_right + db_away
            _store(dremoval, place, da_CK, mask)
            _store(dremoval, place + K, db_CK, mask)
        dq_CK = left * dq_left + read * dread_CK
        dk_CK = right * dk_right + dk_away
        _store(dq, spot, dq_CK, mask)
        _store(dk, spot, dk_CK, mask)
        if KEY:
            dg_CK = q_CK * dq_CK - k_CK * dk_CK
            along += dkept_K * kept_K
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
        self.has_key, self.has_value, self.removes = (x is not None for x in (decay, value_decay, removal))
        precision = self.wide_precision = dot_precision(v.dtype)
        self.wide = v.dtype
        # Powers up to e^75 are beyond float16; its mantissa is that of TF32.
        if v.dtype == torch.float16 and (self.has_key or self.has_value):
            self.wide, self.wide_precision = torch.float32, self.solve_precision
        self.of_keys = {
            "H": self.heads, "K": self.keys, "KEY": self.has_key, "REMOVE": self.removes,
            "C": CHUNK, "WIDE": TYPES[self.wide],
        }  # fmt: skip
        self.of_values = {
            "V": self.values, "VALUE": self.has_value,
            "WIDE_PRECISION": self.wide_precision, "PRECISION": precision,
        }  # fmt: skip

    @property
    def solve_precision(self) -> str:
        """Of products of float32 around the system, which has no more digits than what it is made of."""
        if self.dtype == torch.float32:
            return dot_precision(torch.float32)
        return "tf32" if generation().startswith("sm_") else "ieee"

    def run_chunks(self, kernel: Any, *args: Any) -> None:
        """One program for each chunk and head, without its values."""
        launch(
            kernel, (self.batch * self.heads * self.chunks,), *args, self.length, self.chunks,
            config=self.config(kernel), **self.of_keys, PRECISION=self.wide_precision, SOLVE=self.solve_precision,
        )  # fmt: skip

    def run_values(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """One program for each chunk and head."""
        launch(
            kernel, (self.batch * self.heads * self.chunks,), *args, self.length, self.chunks,
            config=self.config(kernel), **self.of_keys, **self.of_values, **constants,
        )  # fmt: skip

    def run_scan(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """One program for each head and block of value channels."""
        config = self.config(kernel)
        launch(
            kernel, (self.batch * self.heads, -(-self.values // config.blocks["BV"])), *args, self.length, self.chunks,
            config=config, **self.of_keys, **self.of_values, KP=padded(self.keys), **constants,
        )  # fmt: skip

    def config(self, kernel: Any) -> Config:
        """Its blocks are no wider than what there is."""
        variant = "value decays" if self.has_value else ""
        found = choose(kernel.fn.__name__, generation(), self.dtype, self.keys, self.values, variant)
        most = {"BK": padded(self.keys), "BV": padded(self.values)}
        return replace(found, blocks={name: min(size, most[name]) for name, size in found.blocks.items()})


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
    removes = shape.removes
    q_read, k_write = (torch.empty_like(q) if shape.has_key else None for _ in range(2))
    a_read, b_write = (torch.empty_like(q) if removes else None for _ in range(2))
    keep = q.new_empty(*per_head, shape.chunks, shape.keys, dtype=torch.float32) if shape.has_key else None
    pairs = q.new_empty(*cells, CHUNK)
    removed, solved, inverse = (torch.empty_like(pairs) if removes else None for _ in range(3))
    made = (q_read, k_write, a_read, b_write, keep, pairs, removed, solved)
    shape.run_chunks(dplr_pairs, q, k, removal, decay, *made, inverse)
    u = torch.empty_like(v) if removes else None
    states = q.new_empty(*per_head, shape.groups, shape.values, shape.keys)
    final = q.new_empty(shape.batch, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    o = torch.empty_like(v)
    scaled = (q, k) if q_read is None else (q_read, k_write)
    shape.run_scan(dplr_scan, *scaled, *made[2:], v, value_decay, u, states, state, final, o, GROUP=GROUP)
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
    scaled = (q_read, k_write) if shape.has_key else (q, k)
    w, b, dropped, n, m, kept_u = (
        x if shape.removes else None for x in (a_read, b_write, removed, solved, inverse, u)
    )
    kept_keep = keep if shape.has_key else None
    dv = torch.empty_like(v)
    du = torch.empty_like(v) if shape.removes else None
    dvalue_decay = None if value_decay is None else torch.empty_like(value_decay)
    dstate = q.new_empty(shape.batch, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    dstates = q.new_empty(shape.batch * shape.heads, shape.chunks, shape.values, shape.keys)
    shape.run_scan(
        dplr_scan_backward, *scaled, w, b, kept_keep, pairs, dropped, n, v, value_decay, kept_u,
        o if shape.has_value else None, do, dfinal, dstates, du, dv, dvalue_decay, dstate,
    )  # fmt: skip
    dq_read, dk_write = (torch.empty_like(q) for _ in range(2))
    da_read, db_write = (torch.empty_like(q) if shape.removes else None for _ in range(2))
    dkeep = torch.empty_like(keep) if shape.has_key else None
    dpairs = torch.empty_like(pairs, dtype=shape.wide)
    dremoved, dsolved = (torch.empty_like(dpairs) if shape.removes else None for _ in range(2))
    made = (dq_read, dk_write, da_read, db_write, dkeep, dpairs, dremoved, dsolved)
    shape.run_values(
        dplr_pairs_backward, scaled[1], b, kept_keep, v, value_decay, kept_u, states, do, dstates, du, *made,
        dvalue_decay, GROUP=GROUP,
    )  # fmt: skip
    del dstates, du
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dremoval = None if removal is None else torch.empty_like(removal)
    ddecay = None if decay is None else torch.empty_like(decay)
    shape.run_chunks(
        dplr_gradients, q, k, removal, decay, kept_keep, w, n, m, *made, dq, dk, dremoval, ddecay
    )
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
