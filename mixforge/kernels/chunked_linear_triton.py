"""The linear family in Triton: stages that every decay and both rules share.

A sequence is cut into chunks of 64 rows. For each chunk and value head, with G the running sum of its log decays,
gram, reading, writing and keep as in `chunk_gates`, and S0 the state before the chunk:

    linear_gram      P = gram(Q, K), A = beta gram(K, K) below the diagonal; G    rule delta, or decays per channel
    linear_solve     M = (I + A)^-1                                                           rule delta
    linear_scan      U = M beta (V - reading(K) S0), or V under rule add; S1 = keep(S0) + writing(K)^T U
    linear_output    O = reading(Q) S0 + P U; P, where no stage before has made it

Where it has programs enough to fill a device, `linear_scan` makes O as well, and P under rule add: U and the states, that
`linear_output` would read, are then written for backward alone, and not at all without gradients. Backwards, from dO and
the gradient of the last state:

    linear_scan_backward     dU = P^T dO + writing(K) dS1;  dX = M^T dU (dU under rule add);
                             dS0 = keep(dS1) + reading(Q)^T dO - reading(K)^T (beta dX)
    linear_pairs_backward    dP = dO U^T, dA = -dX U^T
    linear_gradients         dQ, dK, dV, dG and dbeta of a block of key channels

The rule decides how U is made, the decay decides gram and three scalings: a new combination needs no new kernel.
For backward P, M, U and the states between the chunks are kept; W = M beta reading(K) of the papers is never formed.

Decays of a token and head enter as differences that are masked before the exponential. Decays of a channel are
products of two powers that start from the sum in the first row of a block of 16, never behind the later of the two
rows: nothing of a later row enters an earlier one, and with log decays of at least -5 no power passes e^75. M comes
from substitution in the blocks of 16 rows on the diagonal, merged by products of blocks: a Neumann series fails for
keys that resemble one another. States and sums are float32; operands of products have the dtype of v. Log decays
below -30 count as -30: e^-30 is nothing beside the rounding of float32, and sums stay small enough to be differenced.

Source: Yang et al. 2023 (arXiv 2312.06635, section 4) for chunks with decays; Yang et al. 2024 (arXiv 2406.06484,
section 3.2) and Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464, section 3.3) for the delta rule. Departures: U is
made from M in the scan; the gradient is from the equations above, which need neither W nor its gradient.
"""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.arguments import check_arguments
from mixforge.kernels.backend import BeyondKernels
from mixforge.kernels.blocks import ANY, Config, ShapeClass, choose, rows_for
from mixforge.kernels.chunked_linear_rows_triton import (
    chunk_place,
    chunk_sums,
    cut_log,
    row_scalings,
    running_sums,
    sequence_place,
)
from mixforge.kernels.chunked_linear_wide_triton import (
    linear_scan_backward_wide,
    linear_scan_wide,
    linear_step_wide,
)
from mixforge.kernels.launch import check_device, dot_precision, generation, launch, on_device, recording

CHUNK = 64
BLOCK = 16
GATES = {"none": 0, "head": 1, "scalar": 2, "channel": 3}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Of one scan whose state stays in registers: float32 keys wider than 128 are beyond the shared memory of every device.
MOST_KEYS = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
# Programs, each of one head and 64 of the values, with which a scan fills a device: about its multiprocessors.
ENOUGH = 128
# Of a group, where there are more and the rule is add.
GROUP = 128
# Of one token.
MOST_KEYS_NOW = 256


@triton.jit(do_not_specialize=["T", "NC"])
def linear_gram(
    q, k, log, beta, sums, q_read, k_read, k_write, pairs, system, cu, table, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and A of one chunk and head, the running sums of its log decays, and what decays per channel scale."""
    bg, chunk = tl.program_id(0), tl.program_id(1)
    g = bg % G
    first, length, c, _ = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within = tl.arange(0, C)
    # Places count from the chunk's first row: numbers of 64 bits for each element would fill the registers.
    base = first + c * C
    count = tl.maximum(tl.minimum(length - c * C, C), 0).to(tl.int32)
    valid = within < count
    last_row = tl.maximum(count, 1) - 1
    head = base * G + g
    q += (base * H + g // (G // H)) * K
    k += (base * H + g // (G // H)) * K
    pairs += head * C
    if GATE == 3:
        log += head * K
        sums += head * K
        q_read += head * K
        k_read += head * K
        k_write += head * K
    if GATE == 2:
        log += head
        sums += base * G
    inner = tl.zeros([C, C], tl.float32)
    keys = tl.zeros([C, C], tl.float32)
    # Products of float32 hold so much that those of keys take a turn of their own.
    APART: tl.constexpr = DELTA and (GATE == 3) and (WIDE == tl.float32)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        mask = valid[:, None] & (channel < K)[None, :]
        key_row = (within * (H * K))[:, None] + channel[None, :]
        q_CK = tl.load(q + key_row, mask=mask, other=0.0)
        k_CK = tl.load(k + key_row, mask=mask, other=0.0)
        if GATE == 3:
            spot = (within * (G * K))[:, None] + channel[None, :]
            total = tl.cumsum(tl.load(log + spot, mask=mask, other=0.0).to(tl.float32), 0)
            tl.store(sums + spot, total, mask=mask)
            # Single rows of the sums are read again: a sum over rows, of which one counts, takes longer.
            tl.debug_barrier()
            last = tl.load(sums + last_row * (G * K) + channel, mask=channel < K, other=0.0)
            read = tl.exp(total)
            dtype = q_read.dtype.element_ty
            tl.store(q_read + spot, (q_CK.to(tl.float32) * read).to(dtype), mask=mask)
            tl.store(k_read + spot, (k_CK.to(tl.float32) * read).to(dtype), mask=mask)
            write = tl.exp(tl.minimum(last[None, :] - total, 0.0))
            tl.store(k_write + spot, (k_CK.to(tl.float32) * write).to(dtype), mask=mask)
            anchors = _anchors(sums, within, last_row, channel, G, K, SUB)
            # From another number in each turn, or masks of pairs that are the same in all would be held in registers.
            number = within + 2 * start
            inner += _pairs(q_CK, k_CK, total, anchors, number, SUB, WIDE, PRECISION)
            if DELTA and not APART:
                keys += _pairs(k_CK, k_CK, total, anchors, number, SUB, WIDE, PRECISION)
        else:
            inner = tl.dot(q_CK, tl.trans(k_CK), inner, input_precision=PRECISION)
            if DELTA:
                keys = tl.dot(k_CK, tl.trans(k_CK), keys, input_precision=PRECISION)
    if APART:
        for start in range(0, K, BK):
            channel = start + tl.arange(0, BK)
            mask = valid[:, None] & (channel < K)[None, :]
            k_CK = tl.load(k + (within * (H * K))[:, None] + channel[None, :], mask=mask, other=0.0)
            total = tl.load(sums + (within * (G * K))[:, None] + channel[None, :], mask=mask, other=0.0)
            anchors = _anchors(sums, within, last_row, channel, G, K, SUB)
            keys += _pairs(k_CK, k_CK, total, anchors, within + 2 * start, SUB, WIDE, PRECISION)
    causal = within[:, None] >= within[None, :]
    if GATE == 2:
        decay = tl.load(log + within * G, mask=valid, other=0.0).to(tl.float32)
        total = tl.cumsum(cut_log(decay), 0)
        tl.store(sums + within * G + g, total, mask=valid)
    if GATE == 1:
        total = running_sums(log, sums, g, within, valid, within, G, GATE)
    if (GATE == 1) or (GATE == 2):
        weight = _weight(total, causal & valid[:, None])
        inner *= weight
        keys *= weight
    place = (within * (G * C))[:, None] + within[None, :]
    tl.store(pairs + place, tl.where(causal, inner, 0.0).to(pairs.dtype.element_ty), mask=valid[:, None])
    if DELTA:
        step = tl.load(beta + head + within * G, mask=valid, other=0.0).to(tl.float32)
        below = within[:, None] > within[None, :]
        tl.store(system + head * C + place, tl.where(below, step[:, None] * keys, 0.0), mask=valid[:, None])


@triton.jit
def _weight(total, pairs):
    """What is left at row i of what was written at row j, [C, C], from the sums of scalar decays; 1 elsewhere."""
    return tl.exp(tl.where(pairs, total[:, None] - total[None, :], 0.0))


@triton.jit
def _anchors(sums, within, last_row, channel, G: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr):
    """Sums [C, BK] that a row's powers start from: in the first rows of the chunk's second half, of the second block of
    its half, and of its own block. They are read again: a sum over rows of which one counts would take longer."""
    middle = tl.minimum(within * 0 + 2 * SUB, last_row)
    second = tl.minimum(within // (2 * SUB) * (2 * SUB) + SUB, last_row)
    block = tl.minimum(within // SUB * SUB, last_row)
    return (
        _rows_of(sums, middle, channel, G, K),
        _rows_of(sums, second, channel, G, K),
        _rows_of(sums, block, channel, G, K),
    )


@triton.jit
def _rows_of(sums, row, channel, G: tl.constexpr, K: tl.constexpr):
    place = (row * (G * K))[:, None] + channel[None, :]
    return tl.load(sums + place, mask=(channel < K)[None, :], other=0.0)


@triton.jit
def _pairs(
    x, k, total, anchors, number, SUB: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Sums over channels of x_i e^(G_i - G_j) k_j for the pairs i >= j of a chunk, [C, C]; those above are anything.

    Pairs of two halves of the chunk take powers from the second half's first row, pairs of two blocks of a half from the
    second block's: all are at most 1. Pairs of one block take two, from its first row, and others may overflow there.
    """
    middle, second, block = anchors
    x, k = x.to(tl.float32), k.to(tl.float32)
    power = tl.exp(-tl.abs(total - middle))
    far_x, far_k = _operand(x * power, WIDE, PRECISION), _operand(k * power, WIDE, PRECISION)
    power = tl.exp(-tl.abs(total - second))
    near_x, near_k = _operand(x * power, WIDE, PRECISION), _operand(k * power, WIDE, PRECISION)
    own_x = _operand(x * tl.exp(tl.minimum(total - block, 0.0)), WIDE, PRECISION)
    own_k = _operand(k * tl.exp(tl.minimum(block - total, 80.0)), WIDE, PRECISION)
    apart = number[:, None] ^ number[None, :]
    made = tl.dot(far_x, tl.trans(far_k), input_precision=PRECISION)
    made = tl.where(apart < 2 * SUB, tl.dot(near_x, tl.trans(near_k), input_precision=PRECISION), made)
    return tl.where(apart < SUB, tl.dot(own_x, tl.trans(own_k), input_precision=PRECISION), made)


@triton.jit
def _operand(value, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """What a product takes of float32 numbers. To TF32 they are rounded, which a device would cut instead."""
    if PRECISION == "tf32":
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return value.to(WIDE)


@triton.jit
def _as_product(value):
    """The same numbers, spread over the threads as those that a product makes: nothing is moved where the two meet."""
    left = tl.zeros([value.shape[0], 16], tl.bfloat16)
    return tl.dot(left, tl.zeros([16, value.shape[1]], tl.bfloat16), value)


@triton.jit
def _up_to(
    total, sums, start, last_row, channel, within, G: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """Powers e^(a - G_j) of the rows before the end of a block, a the sum in its first row; others 0."""
    anchor = tl.load(sums + tl.minimum(start, last_row) * (G * K) + channel, mask=channel < K, other=0.0)
    before = (within < start + SUB)[:, None]
    return tl.where(before, tl.exp(tl.where(before, tl.minimum(anchor[None, :] - total, 80.0), 0.0)), 0.0)


@triton.jit
def _block(
    system,
    row,
    g,
    valid,
    i: tl.constexpr,
    j: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    SUB: tl.constexpr,
):
    """Rows of block i and columns of block j of A."""
    column = j * SUB + tl.arange(0, SUB)
    return tl.load(
        system + ((row + i * SUB) * G + g)[:, None] * C + column[None, :], mask=valid[:, None], other=0.0
    )


@triton.jit(do_not_specialize=["T", "NC"])
def linear_solve(
    system, inverse, cu, table, T, NC,
    G: tl.constexpr, VARLEN: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M = (I + A)^-1 of one chunk and head: substitution in the diagonal blocks, then products of blocks. A is lost."""
    bg, chunk = tl.program_id(0), tl.program_id(1)
    g = bg % G
    first, length, c, _ = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within = tl.arange(0, SUB)
    row = first + c * C + within
    left = length - c * C
    in_0, in_1, in_2, in_3 = (
        within < left,
        within + SUB < left,
        within + 2 * SUB < left,
        within + 3 * SUB < left,
    )
    # Each column by itself, of all blocks on the diagonal beside one another: a thread needs nothing of another's.
    column = tl.arange(0, C)
    start = column // SUB * SUB
    corner = system + ((first + c * C + start) * G + g) * C + start
    rows = (tl.where(column == start, 1.0, 0.0),)
    for i in tl.static_range(1, SUB):
        row_C = tl.where(column == start + i, 1.0, 0.0)
        for j in tl.static_range(i):
            row_C -= tl.load(corner + (i * G * C + j), mask=start + i < left, other=0.0) * rows[j]
        rows += (row_C,)
    # In place of A, of which all has been read, to be read again as blocks.
    tl.debug_barrier()
    for i in tl.static_range(SUB):
        tl.store(corner + (column - start + i * G * C), rows[i], mask=start + i < left)
    tl.debug_barrier()
    m_00 = _block(system, row, g, in_0, 0, 0, G, C, SUB)
    m_11 = _block(system, row, g, in_1, 1, 1, G, C, SUB)
    m_22 = _block(system, row, g, in_2, 2, 2, G, C, SUB)
    m_33 = _block(system, row, g, in_3, 3, 3, G, C, SUB)
    a_10 = _block(system, row, g, in_1, 1, 0, G, C, SUB)
    a_20 = _block(system, row, g, in_2, 2, 0, G, C, SUB)
    a_21 = _block(system, row, g, in_2, 2, 1, G, C, SUB)
    a_30 = _block(system, row, g, in_3, 3, 0, G, C, SUB)
    a_31 = _block(system, row, g, in_3, 3, 1, G, C, SUB)
    a_32 = _block(system, row, g, in_3, 3, 2, G, C, SUB)
    m_10 = -tl.dot(m_11, tl.dot(a_10, m_00, input_precision=PRECISION), input_precision=PRECISION)
    m_21 = -tl.dot(m_22, tl.dot(a_21, m_11, input_precision=PRECISION), input_precision=PRECISION)
    m_32 = -tl.dot(m_33, tl.dot(a_32, m_22, input_precision=PRECISION), input_precision=PRECISION)
    sum_20 = tl.dot(a_20, m_00, input_precision=PRECISION) + tl.dot(a_21, m_10, input_precision=PRECISION)
    m_20 = -tl.dot(m_22, sum_20, input_precision=PRECISION)
    sum_31 = tl.dot(a_31, m_11, input_precision=PRECISION) + tl.dot(a_32, m_21, input_precision=PRECISION)
    m_31 = -tl.dot(m_33, sum_31, input_precision=PRECISION)
    sum_30 = tl.dot(a_30, m_00, input_precision=PRECISION) + tl.dot(a_31, m_10, input_precision=PRECISION)
    sum_30 += tl.dot(a_32, m_20, input_precision=PRECISION)
    m_30 = -tl.dot(m_33, sum_30, input_precision=PRECISION)
    zero = tl.zeros([SUB, SUB], tl.float32)
    _store_row(inverse, row, g, in_0, 0, m_00, zero, zero, zero, G, C, SUB)
    _store_row(inverse, row, g, in_1, 1, m_10, m_11, zero, zero, G, C, SUB)
    _store_row(inverse, row, g, in_2, 2, m_20, m_21, m_22, zero, G, C, SUB)
    _store_row(inverse, row, g, in_3, 3, m_30, m_31, m_32, m_33, G, C, SUB)


@triton.jit
def _store_row(
    inverse, row, g, valid, i: tl.constexpr, m_0, m_1, m_2, m_3, G: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """The four blocks of a row of blocks."""
    place = inverse + ((row + i * SUB) * G + g)[:, None] * C + tl.arange(0, SUB)[None, :]
    tl.store(place, m_0.to(inverse.dtype.element_ty), mask=valid[:, None])
    tl.store(place + SUB, m_1.to(inverse.dtype.element_ty), mask=valid[:, None])
    tl.store(place + 2 * SUB, m_2.to(inverse.dtype.element_ty), mask=valid[:, None])
    tl.store(place + 3 * SUB, m_3.to(inverse.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["T", "NC"])
def linear_scan(
    q_read, pairs, o, k_read, k_write, v, log, beta, sums, inverse, u, states, first_state, final_state,
    cu, offsets, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U, the state before each chunk and the last: one head of a sequence and a block of value channels.

    With q_read O as well, and P where no stage before has made it. What is None is not kept.
    """
    ng, block = tl.program_id(0), tl.program_id(1)
    g = ng % G
    first, length, chunk = sequence_place(ng // G, cu, offsets, T, NC, VARLEN)
    channel, value, within = tl.arange(0, KP), block * BV + tl.arange(0, BV), tl.arange(0, C)
    matrix = channel[:, None] * V + value[None, :]
    in_matrix = (channel < K)[:, None] & (value < V)[None, :]
    if first_state is None:
        state = tl.zeros([KP, BV], tl.float32)
    else:
        state = tl.load(first_state + ng.to(tl.int64) * K * V + matrix, mask=in_matrix, other=0.0).to(
            tl.float32
        )
    for start in range(0, length, C):
        if states is not None:
            before = states + (chunk * G + g) * K * V + matrix
            tl.store(before, state.to(states.dtype.element_ty), mask=in_matrix)
        count = tl.minimum(length - start, C).to(tl.int32)
        valid = within < count
        row = first + start + within
        in_keys = valid[:, None] & (channel < K)[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        key_row = (row * H + g // (G // H))[:, None] * K + channel[None, :]
        pair = (row * G + g)[:, None] * C + within[None, :]
        k_CK = tl.load(k_read + key_row, mask=in_keys, other=0.0)
        spot = (row * G + g)[:, None] * V + value[None, :]
        u_CV = tl.load(v + spot, mask=in_values, other=0.0)
        if (GATE == 2) and not DELTA:
            # No stage before has made the sums.
            decay = cut_log(tl.load(log + row * G + g, mask=valid, other=0.0).to(tl.float32))
            total = tl.cumsum(decay, 0)
            last = tl.sum(tl.where(within == count - 1, total, 0.0), 0)
            if sums is not None:
                tl.store(sums + row * G + g, total, mask=valid & (block == 0))
        elif (GATE == 1) or (GATE == 2):
            total, last = chunk_sums(
                log, sums, g, row, valid, within, first + start + count - 1, count, G, GATE
            )
        if q_read is not None:
            q_CK = tl.load(q_read + key_row, mask=in_keys, other=0.0)
            if DELTA or (GATE == 3):
                p_CC = tl.load(pairs + pair, mask=valid[:, None], other=0.0)
            else:
                inner = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
                # With the start, or a mask that is the same in all turns would be held in registers.
                token = tl.cast(start, tl.int32) + within
                causal = token[:, None] >= token[None, :]
                if (GATE == 1) or (GATE == 2):
                    inner *= tl.exp(
                        tl.where(causal & valid[:, None], total[:, None] - total[None, :], float("-inf"))
                    )
                    p_CC = inner.to(q_CK.dtype)
                else:
                    p_CC = tl.where(causal, inner, 0.0).to(q_CK.dtype)
                if pairs is not None:
                    tl.store(pairs + pair, p_CC, mask=valid[:, None] & (block == 0))
            o_CV = tl.dot(q_CK, state.to(q_CK.dtype), input_precision=PRECISION)
            if (GATE == 1) or (GATE == 2):
                o_CV *= tl.exp(total)[:, None]
        if DELTA:
            step = tl.load(beta + row * G + g, mask=valid, other=0.0).to(tl.float32)
            m_CC = tl.load(inverse + pair, mask=valid[:, None], other=0.0)
            x_CV = tl.dot(k_CK, state.to(k_CK.dtype), input_precision=PRECISION)
            if (GATE == 1) or (GATE == 2):
                x_CV *= tl.exp(total)[:, None]
            x_CV = (step[:, None] * (u_CV.to(tl.float32) - x_CV)).to(k_CK.dtype)
            u_CV = tl.dot(m_CC, x_CV, input_precision=PRECISION).to(k_CK.dtype)
            if u is not None:
                tl.store(u + spot, u_CV, mask=in_values)
        if q_read is not None:
            o_CV = tl.dot(p_CC, u_CV, o_CV, input_precision=PRECISION)
            tl.store(o + spot, o_CV.to(o.dtype.element_ty), mask=in_values)
        if GATE == 3:
            k_CK = tl.load(k_write + key_row, mask=in_keys, other=0.0)
            last = (first + start + count - 1) * G + g
            state *= tl.exp(tl.load(sums + last * K + channel, mask=channel < K, other=0.0))[:, None]
        if (GATE == 1) or (GATE == 2):
            write = tl.exp(tl.minimum(last - total, 0.0))
            u_CV = (u_CV.to(tl.float32) * write[:, None]).to(k_CK.dtype)
            state *= tl.exp(last)
        state = tl.dot(tl.trans(k_CK), u_CV, state, input_precision=PRECISION)
        chunk += 1
    tl.store(final_state + ng.to(tl.int64) * K * V + matrix, state, mask=in_matrix)


@triton.jit(do_not_specialize=["T", "NC"])
def linear_output(
    q_read, k, log, sums, pairs, u, states, o, cu, table, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, GRAM: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O of one chunk and head, a block of value channels; with GRAM, P as well."""
    bg, chunk, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = bg % G
    first, length, c, h = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within, value = tl.arange(0, C), block * BV + tl.arange(0, BV)
    valid = c * C + within < length
    row = first + c * C + within
    spot = (row * G + g)[:, None] * V + value[None, :]
    in_values = valid[:, None] & (value < V)[None, :]
    o_CV = tl.zeros([C, BV], tl.float32)
    inner = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        in_keys = valid[:, None] & (channel < K)[None, :]
        key_row = (row * H + g // (G // H))[:, None] * K + channel[None, :]
        q_CK = tl.load(q_read + key_row, mask=in_keys, other=0.0)
        matrix = (h * G + g) * K * V + channel[:, None] * V + value[None, :]
        state = tl.load(states + matrix, mask=(channel < K)[:, None] & (value < V)[None, :], other=0.0)
        o_CV = tl.dot(q_CK, state.to(q_CK.dtype), o_CV, input_precision=PRECISION)
        if GRAM:
            k_CK = tl.load(k + key_row, mask=in_keys, other=0.0)
            inner = tl.dot(q_CK, tl.trans(k_CK), inner, input_precision=PRECISION)
    place = pairs + (row * G + g)[:, None] * C + within[None, :]
    causal = within[:, None] >= within[None, :]
    if (GATE == 1) or (GATE == 2):
        total = running_sums(log, sums, g, row, valid, within, G, GATE)
        o_CV *= tl.exp(total)[:, None]
        if GRAM:
            inner *= _weight(total, causal & valid[:, None])
    if GRAM:
        p_CC = tl.where(causal, inner, 0.0).to(pairs.dtype.element_ty)
        tl.store(place, p_CC, mask=valid[:, None] & (block == 0))
    else:
        p_CC = tl.load(place, mask=valid[:, None], other=0.0)
    o_CV = tl.dot(p_CC, tl.load(u + spot, mask=in_values, other=0.0), o_CV, input_precision=PRECISION)
    tl.store(o + spot, o_CV.to(o.dtype.element_ty), mask=in_values)


@triton.jit(do_not_specialize=["T", "NC"])
def linear_scan_backward(
    q_read, k_read, k_write, log, beta, sums, pairs, inverse, do, dx, dstates, dfinal, dfirst, cu, offsets, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX and the gradient of the state after each chunk, from the last chunk to the first."""
    ng, block = tl.program_id(0), tl.program_id(1)
    g = ng % G
    first, length, chunk = sequence_place(ng // G, cu, offsets, T, NC, VARLEN)
    channel, value, within = tl.arange(0, KP), block * BV + tl.arange(0, BV), tl.arange(0, C)
    matrix = channel[:, None] * V + value[None, :]
    in_matrix = (channel < K)[:, None] & (value < V)[None, :]
    if dfinal is None:
        dstate = tl.zeros([KP, BV], tl.float32)
    else:
        dstate = tl.load(dfinal + ng.to(tl.int64) * K * V + matrix, mask=in_matrix, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, C)
    for back in range(0, chunks):
        c = chunks - 1 - back
        start = c * C
        spot = ((chunk + c) * G + g) * K * V + matrix
        tl.store(dstates + spot, dstate.to(dstates.dtype.element_ty), mask=in_matrix)
        valid = start + within < length
        row = first + start + within
        count = tl.minimum(length - start, C)
        in_keys = valid[:, None] & (channel < K)[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        key_row = (row * H + g // (G // H))[:, None] * K + channel[None, :]
        if (GATE == 1) or (GATE == 2):
            read, write, keep = row_scalings(
                log, sums, g, row, valid, within, first + start + count - 1, count, G, GATE
            )
        k_CK = tl.load(k_write + key_row, mask=in_keys, other=0.0)
        du_CV = tl.dot(k_CK, dstate.to(k_CK.dtype), input_precision=PRECISION)
        spot = (row * G + g)[:, None] * V + value[None, :]
        do_CV = tl.load(do + spot, mask=in_values, other=0.0)
        pair = (row * G + g)[:, None] * C + within[None, :]
        p_CC = tl.load(pairs + pair, mask=valid[:, None], other=0.0)
        if (GATE == 1) or (GATE == 2):
            du_CV *= write[:, None]
        du_CV = tl.dot(tl.trans(p_CC), do_CV, du_CV, input_precision=PRECISION)
        q_CK = tl.load(q_read + key_row, mask=in_keys, other=0.0)
        if GATE == 3:
            last = (first + start + count - 1) * G + g
            dstate *= tl.exp(tl.load(sums + last * K + channel, mask=channel < K, other=0.0))[:, None]
        if (GATE == 1) or (GATE == 2):
            do_CV = (do_CV.to(tl.float32) * read[:, None]).to(q_CK.dtype)
            dstate *= keep
        dstate = tl.dot(tl.trans(q_CK), do_CV, dstate, input_precision=PRECISION)
        if DELTA:
            step = tl.load(beta + row * G + g, mask=valid, other=0.0).to(tl.float32)
            m_CC = tl.load(inverse + pair, mask=valid[:, None], other=0.0)
            du_CV = tl.dot(tl.trans(m_CC), du_CV.to(k_CK.dtype), input_precision=PRECISION)
            # Negative, so that the product can be added to what is there.
            factor = -step
            if (GATE == 1) or (GATE == 2):
                factor *= read
            if GATE == 3:
                k_CK = tl.load(k_read + key_row, mask=in_keys, other=0.0)
            dvalue_CV = (factor[:, None] * du_CV).to(k_CK.dtype)
            dstate = tl.dot(tl.trans(k_CK), dvalue_CV, dstate, input_precision=PRECISION)
        tl.store(dx + spot, du_CV.to(dx.dtype.element_ty), mask=in_values)
    tl.store(dfirst + ng.to(tl.int64) * K * V + matrix, dstate, mask=in_matrix)


@triton.jit(do_not_specialize=["T", "NC"])
def linear_pairs_backward(
    v, log, beta, sums, u, do, dx, dv, dbeta, dpairs, dsystem, cu, table, T, NC,
    G: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dP and dA of one chunk and head, those of scalar decays times e^(G_i - G_j); under rule delta dV and its part of
    dbeta."""
    bg, chunk = tl.program_id(0), tl.program_id(1)
    g = bg % G
    first, length, c, _ = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within = tl.arange(0, C)
    valid = c * C + within < length
    row = first + c * C + within
    dp_CC = tl.zeros([C, C], tl.float32)
    da_CC = tl.zeros([C, C], tl.float32)
    dstep = tl.zeros([C], tl.float32)
    step = tl.zeros([C], tl.float32)
    if DELTA:
        step = tl.load(beta + row * G + g, mask=valid, other=0.0).to(tl.float32)
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        spot = (row * G + g)[:, None] * V + value[None, :]
        mask = valid[:, None] & (value < V)[None, :]
        u_CV = tl.load(u + spot, mask=mask, other=0.0)
        dp_CC = tl.dot(
            tl.load(do + spot, mask=mask, other=0.0), tl.trans(u_CV), dp_CC, input_precision=PRECISION
        )
        if DELTA:
            dx_CV = tl.load(dx + spot, mask=mask, other=0.0)
            da_CC = tl.dot(dx_CV, tl.trans(u_CV), da_CC, input_precision=PRECISION)
            v_CV = tl.load(v + spot, mask=mask, other=0.0)
            dstep += tl.sum(dx_CV.to(tl.float32) * v_CV.to(tl.float32), 1)
            tl.store(dv + spot, (step[:, None] * dx_CV.to(tl.float32)).to(dv.dtype.element_ty), mask=mask)
    causal = within[:, None] >= within[None, :]
    if (GATE == 1) or (GATE == 2):
        total = running_sums(log, sums, g, row, valid, within, G, GATE)
        weight = _weight(total, causal & valid[:, None])
        dp_CC *= weight
        da_CC *= weight
    place = (row * G + g)[:, None] * C + within[None, :]
    tl.store(dpairs + place, tl.where(causal, dp_CC, 0.0).to(dpairs.dtype.element_ty), mask=valid[:, None])
    if DELTA:
        below = within[:, None] > within[None, :]
        tl.store(
            dsystem + place, tl.where(below, -da_CC, 0.0).to(dsystem.dtype.element_ty), mask=valid[:, None]
        )
        tl.store(dbeta + row * G + g, dstep, mask=valid)


@triton.jit(do_not_specialize=["rows", "T", "NC"])
def linear_gradients(
    q, k, log, beta, sums, u, states, do, dx, dstates, dpairs, dsystem, dq, dk, dlog, dbeta,
    cu, table, rows, T, NC,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    VARLEN: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and dK of one chunk and head, a block of key channels, with its part of dbeta, and of dG where it is wanted."""
    bg, chunk, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = bg % G
    first, length, c, h = chunk_place(chunk, bg // G, cu, table, T, NC, VARLEN)
    within, channel = tl.arange(0, C), block * BK + tl.arange(0, BK)
    # Places count from the chunk's first row: numbers of 64 bits for each element would fill the registers.
    base = first + c * C
    count = tl.maximum(tl.minimum(length - c * C, C), 0).to(tl.int32)
    valid = within < count
    head = base * G + g
    q += base * (H * K) + g // (G // H) * K
    k += base * (H * K) + g // (G // H) * K
    dq += head * K
    dk += head * K
    u += head * V
    do += head * V
    dpairs += head * C
    states += (h * G + g) * (K * V)
    dstates += (h * G + g) * (K * V)
    # Rows of scalars, one for each block of key channels.
    part = block.to(tl.int64) * rows * G + head
    if GATE == 3:
        sums += head * K
        if dlog is not None:
            dlog += head * K
    if GATE == 2:
        sums += base * G
        if dlog is not None:
            dlog += part
    if DELTA:
        beta += head
        dx += head * V
        dsystem += head * C
        # The first part is that of the values, to which a single block adds its own.
        dbeta += part
        if K > BK:
            dbeta += rows * G
    step = tl.full([C], 1.0, tl.float32)
    if DELTA:
        step = tl.load(beta + within * G, mask=valid, other=0.0).to(tl.float32)
    in_keys = valid[:, None] & (channel < K)[None, :]
    key_row = (within * (H * K))[:, None] + channel[None, :]
    pair = (within * (G * C))[:, None] + within[None, :]
    last_row = tl.maximum(count, 1) - 1
    spot = (within * (G * K))[:, None] + channel[None, :]
    d_CK = tl.zeros([C, BK], tl.float32)
    if GATE == 3:
        q_CK = tl.load(q + key_row, mask=in_keys, other=0.0)
        k_CK = tl.load(k + key_row, mask=in_keys, other=0.0)
        dp_CC = tl.load(dpairs + pair, mask=valid[:, None], other=0.0)
        da_CC = dp_CC
        if DELTA:
            da_CC = tl.load(dsystem + pair, mask=valid[:, None], other=0.0)
        total = tl.load(sums + spot, mask=in_keys, other=0.0)
        last = tl.load(sums + last_row * (G * K) + channel, mask=channel < K, other=0.0)
        # Rows beyond the sequence go on from its last, so that no power of theirs is large.
        total = tl.where(valid[:, None], total, last[None, :])
        of_block = tl.minimum(within // SUB * SUB, last_row) * (G * K)
        anchor = tl.load(sums + of_block[:, None] + channel[None, :], mask=(channel < K)[None, :], other=0.0)
        left = tl.exp(tl.minimum(total - anchor, 0.0))
        # Products read what lies otherwise among the threads than what they make: both are held.
        read_total, read_k = total, k_CK.to(tl.float32)
        query_CK = _operand(q_CK.to(tl.float32) * left, WIDE, PRECISION)
        step_CK = _operand((read_k * step[:, None]).to(k_CK.dtype).to(tl.float32) * left, WIDE, PRECISION)
        row_CK = tl.zeros([C, BK], tl.float32)
        step_row_CK = tl.zeros([C, BK], tl.float32)
        for start in range(0, C, SUB):
            inside = ((within >= start) & (within < start + SUB))[:, None]
            right = _up_to(read_total, sums, start, last_row, channel, within, G, K, SUB)
            key_CK = _operand(read_k * right, WIDE, PRECISION)
            # Rows of other blocks may overflow.
            row_CK += tl.where(inside, tl.dot(dp_CC, key_CK, input_precision=PRECISION), 0.0)
            if DELTA:
                step_row_CK += tl.where(inside, tl.dot(da_CC, key_CK, input_precision=PRECISION), 0.0)
        total, k_CK = _as_product(total), _as_product(read_k)
        column_CK = tl.zeros([C, BK], tl.float32)
        for start in range(0, C, SUB):
            inside = ((within >= start) & (within < start + SUB))[:, None]
            right = _up_to(total, sums, start, last_row, channel, within, G, K, SUB)
            written = _operand(k_CK * right, WIDE, PRECISION).to(tl.float32)
            inner_CK = tl.where(inside, query_CK, 0.0).to(WIDE)
            column = tl.dot(tl.trans(dp_CC), inner_CK, input_precision=PRECISION)
            column_CK += right * column
            if dlog is not None:
                d_CK -= written * column
            if DELTA:
                inner_CK = tl.where(inside, step_CK, 0.0).to(WIDE)
                column = tl.dot(tl.trans(da_CC), inner_CK, input_precision=PRECISION)
                column_CK += right * column
                if dlog is not None:
                    d_CK -= written * column
    dq_CK = tl.zeros([C, BK], tl.float32)
    dwrite_CK = tl.zeros([C, BK], tl.float32)
    z_CK = tl.zeros([C, BK], tl.float32)
    # The part of dG that belongs to the chunk's last row: for each channel, or for all of them.
    along = tl.zeros([BK], tl.float32)
    held = 0.0
    for start in range(0, V, BV):
        value = start + tl.arange(0, BV)
        of_values = (within * (G * V))[:, None] + value[None, :]
        in_values = valid[:, None] & (value < V)[None, :]
        matrix = channel[None, :] * V + value[:, None]
        in_matrix = (channel < K)[None, :] & (value < V)[:, None] & (length > 0)
        s_VK = tl.load(states + matrix, mask=in_matrix, other=0.0)
        ds_VK = tl.load(dstates + matrix, mask=in_matrix, other=0.0)
        do_CV = tl.load(do + of_values, mask=in_values, other=0.0)
        u_CV = tl.load(u + of_values, mask=in_values, other=0.0)
        s_VK, ds_VK = s_VK.to(do_CV.dtype), ds_VK.to(do_CV.dtype)
        dq_CK = tl.dot(do_CV, s_VK, dq_CK, input_precision=PRECISION)
        dwrite_CK = tl.dot(u_CV, ds_VK, dwrite_CK, input_precision=PRECISION)
        if dlog is not None:
            if GATE == 3:
                along += tl.sum(s_VK.to(tl.float32) * ds_VK.to(tl.float32), 0)
            else:
                held += tl.sum(s_VK.to(tl.float32) * ds_VK.to(tl.float32))
        if DELTA:
            dx_CV = tl.load(dx + of_values, mask=in_values, other=0.0)
            z_CK = tl.dot(dx_CV, s_VK, z_CK, input_precision=PRECISION)
    z_CK = -z_CK
    if GATE == 3:
        steps_CK = (k_CK * step[:, None]).to(k.dtype.element_ty)
        # Loaded again, for they would fill the registers of both loops.
        q_CK = _as_product(tl.load(q + key_row, mask=in_keys, other=0.0).to(tl.float32))
        anchor = tl.load(sums + of_block[:, None] + channel[None, :], mask=(channel < K)[None, :], other=0.0)
        left = tl.exp(tl.minimum(total - _as_product(anchor), 0.0))
        read = tl.exp(total)
        dq_CK *= read
        z_CK *= read
        dwrite_CK *= tl.exp(tl.minimum(last[None, :] - total, 0.0))
        if dlog is not None:
            along = along * tl.exp(last) + tl.sum(k_CK * dwrite_CK, 0)
            d_CK += _of_sums(q_CK, k_CK, steps_CK, dq_CK, dwrite_CK, z_CK, DELTA)
            d_CK += _operand(q_CK * left, WIDE, PRECISION).to(tl.float32) * row_CK
        dq_CK += left * row_CK
        dwrite_CK += column_CK
        if DELTA:
            if dlog is not None:
                d_CK += _operand(steps_CK.to(tl.float32) * left, WIDE, PRECISION).to(tl.float32) * step_row_CK
            z_CK += left * step_row_CK
    else:
        q_CK = tl.load(q + key_row, mask=in_keys, other=0.0)
        k_CK = tl.load(k + key_row, mask=in_keys, other=0.0)
        steps_CK = (k_CK.to(tl.float32) * step[:, None]).to(k_CK.dtype)
        if GATE != 0:
            read, write, keep = row_scalings(log, sums, g, within, valid, within, last_row, count, G, GATE)
            dq_CK *= read[:, None]
            z_CK *= read[:, None]
            dwrite_CK *= write[:, None]
            if dlog is not None:
                held = held * keep + tl.sum(k_CK.to(tl.float32) * dwrite_CK)
        dp_CC = tl.load(dpairs + pair, mask=valid[:, None], other=0.0)
        dq_CK = tl.dot(dp_CC, k_CK, dq_CK, input_precision=PRECISION)
        dwrite_CK = tl.dot(tl.trans(dp_CC), q_CK, dwrite_CK, input_precision=PRECISION)
        if DELTA:
            da_CC = tl.load(dsystem + pair, mask=valid[:, None], other=0.0)
            dwrite_CK = tl.dot(tl.trans(da_CC), steps_CK, dwrite_CK, input_precision=PRECISION)
            z_CK = tl.dot(da_CC, k_CK, z_CK, input_precision=PRECISION)
        if dlog is not None:
            d_CK = _of_sums(q_CK, k_CK, steps_CK, dq_CK, dwrite_CK, z_CK, DELTA)
    tl.store(dq + spot, dq_CK.to(dq.dtype.element_ty), mask=in_keys)
    if DELTA:
        dstep = tl.sum(k_CK.to(tl.float32) * z_CK, 1)
        if K <= BK:
            dstep += tl.load(dbeta + within * G, mask=valid, other=0.0)
        tl.store(dbeta + within * G, dstep, mask=valid)
        dwrite_CK += z_CK * step[:, None]
    tl.store(dk + spot, dwrite_CK.to(dk.dtype.element_ty), mask=in_keys)
    if dlog is not None:
        last = within == count - 1
        if GATE == 3:
            d_CK += tl.where(last[:, None], along[None, :], 0.0)
            tl.store(dlog + spot, tl.cumsum(d_CK, 0, reverse=True), mask=in_keys)
        elif GATE == 2:
            d_C = tl.sum(d_CK, 1) + tl.where(last, held, 0.0)
            tl.store(dlog + within * G, tl.cumsum(d_C, 0, reverse=True), mask=valid)
        else:
            # A row counts for itself and for all rows before it.
            program = (block.to(tl.int64) * tl.num_programs(1) + chunk) * tl.num_programs(0) + bg
            tl.store(dlog + program, tl.sum((within + 1)[:, None] * d_CK) + count * held)


@triton.jit
def _of_sums(q_CK, k_CK, steps_CK, dq_CK, dwrite_CK, z_CK, DELTA: tl.constexpr):
    """Gradients of the running sums: what is read at a row less what is written there.

    A pair of rows within the chunk stands on both sides and must cancel: each factor is the one that was rounded for
    the product.
    """
    d_CK = q_CK.to(tl.float32) * dq_CK - k_CK.to(tl.float32) * dwrite_CK
    if DELTA:
        d_CK += steps_CK.to(tl.float32) * z_CK
    return d_CK


SCANS = (linear_scan, linear_scan_wide, linear_scan_backward, linear_scan_backward_wide)


def chunked_linear_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None = None,
    beta_BTG: Tensor | None = None,
    state_BGKV: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `chunked_linear_reference`, on a GPU; the state is float32.

    cu_seqlens: [N+1] whole numbers from 0 to T, for N sequences packed one after the other in a batch of 1; states are
    then [N, G, K, V]. Raises ValueError where a shape, dtype or device does not fit.
    """
    check_arguments(q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGKV, cu_seqlens)
    check_limits(q_BTHK, ANY)
    if q_BTHK.shape[3] > MOST_KEYS[q_BTHK.dtype] and beta_BTG is None:
        return by_groups_of_keys(q_BTHK, k_BTHK, v_BTGV, decay, state_BGKV, cu_seqlens)
    given = (
        q_BTHK,
        k_BTHK,
        v_BTGV,
        None if decay is None else decay.float(),
        None if beta_BTG is None else beta_BTG.float(),
        None if state_BGKV is None else state_BGKV.float(),
    )
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    o_BTGV, state, *_ = forward(*given, cu_seqlens, keeps)
    return o_BTGV, state


def by_groups_of_keys(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    state_BGKV: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rule add over more key channels than the kernels take: it is a sum over groups of them, each a head."""
    batch, length, key_heads, keys = q_BTHK.shape
    heads, values = v_BTGV.shape[2:]
    count = -(-keys // GROUP)
    size, shared = -(-keys // count), heads // key_heads
    parts = (key_heads, count, shared)

    def cut(x: Tensor, dim: int) -> Tensor:
        return torch.unflatten(F.pad(x.movedim(dim, -1), (0, count * size - keys)), -1, (count, size))

    def repeated(x: Tensor, dim: int) -> Tensor:
        """Of value heads, for every group."""
        grouped = torch.unflatten(x, dim, (key_heads, 1, shared))
        shape = (*grouped.shape[: dim + 1], count, *grouped.shape[dim + 2 :])
        return grouped.expand(shape).flatten(dim, dim + 2)

    q, k = (cut(x, 3).flatten(2, 3) for x in (q_BTHK, k_BTHK))
    if decay is not None and decay.dim() == 4:
        decay = cut(decay, 3).unflatten(2, (key_heads, shared)).movedim(4, 3).flatten(2, 4)
    elif decay is not None:
        decay = repeated(decay, decay.dim() - 1)
    state = None
    if state_BGKV is not None:
        state = cut(state_BGKV, 2).unflatten(1, (key_heads, shared)).permute(0, 1, 4, 2, 5, 3).flatten(1, 3)
    o, last = chunked_linear_triton(q, k, repeated(v_BTGV, 2), decay, None, state, cu_seqlens)
    o_BTGV = o.view(batch, length, *parts, values).sum(3, dtype=torch.float32).flatten(2, 3).to(v_BTGV.dtype)
    last = last.unflatten(1, parts).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return o_BTGV, last[:, :, :keys].contiguous()


def check_limits(q: Tensor, most: int | None = None) -> None:
    """Raise ValueError for a dtype that the kernels do not take, BeyondKernels for more key channels than `most`.

    None is what one scan takes whose state stays in registers.
    """
    if q.dtype not in TYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES)
        raise ValueError(f"q is {q.dtype}; backend='triton' takes {known}")
    most = MOST_KEYS[q.dtype] if most is None else most
    if q.shape[3] > most:
        name = str(q.dtype).removeprefix("torch.")
        raise BeyondKernels(
            f"q has {q.shape[3]} key channels; backend='triton' takes at most {most} in {name}: give a smaller key_dim, "
            "or build with backend='torch'"
        )


def gate_of(decay: Tensor | None) -> str:
    """The kind of a decay by its shape."""
    return "none" if decay is None else {1: "head", 3: "scalar", 4: "channel"}[decay.dim()]


def is_hopper_half(dtype: torch.dtype) -> bool:
    """Whether products of half precision are launched for Hopper, whose warps multiply in groups of four."""
    return generation().startswith("sm_9") and dtype.itemsize == 2


class Shape:
    """What every launch of one call has in common."""

    def __init__(
        self, q: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, cu: Tensor | None
    ) -> None:
        self.batch, self.length, self.key_heads, self.keys = q.shape
        self.heads, self.values = v.shape[2:]
        self.gate, self.delta = gate_of(decay), beta is not None
        # Whether a stage of its own makes P: without a system or powers the output does.
        self.has_gram = self.delta or self.gate == "channel"
        # Whether the running sums are stored: those of a fixed decay are not.
        self.sums = self.gate in ("scalar", "channel")
        # Queries and keys that a decay per channel has scaled are those of value heads.
        self.read_heads = self.heads if self.gate == "channel" else self.key_heads
        self.cu = cu
        self.table = self.offsets = None
        self.sequences = self.batch
        self.chunks = -(-self.length // CHUNK)
        if cu is not None:
            self.sequences = len(cu) - 1
            # As many as there can be; those that are not needed belong to sequence -1.
            self.chunks += self.sequences - 1
            counts = (cu.diff() + CHUNK - 1) // CHUNK
            self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            number = torch.arange(self.chunks, device=cu.device)
            owner = torch.searchsorted(self.offsets, number, right=True) - 1
            unused = owner >= self.sequences
            inner = number - self.offsets[owner.clamp(max=self.sequences - 1)]
            self.table = torch.stack(
                [owner.masked_fill(unused, -1), inner.masked_fill(unused, 0)], 1
            ).contiguous()
        self.dtype = v.dtype
        self.is_wide = self.delta and self.keys > MOST_KEYS[v.dtype]
        # Whether the scan makes O as well, so that no other kernel reads states and values again: where the table has
        # blocks for it, and there are programs enough, since each of them goes from chunk to chunk.
        programs = self.sequences * self.heads * -(-self.values // 64)
        self.fuses = programs >= ENOUGH and not self.is_wide and self._has_blocks_with_output()
        # The scan goes on from what it stored.
        self.of_states = torch.float32 if self.is_wide else v.dtype
        # Powers up to e^75 are beyond float16; its mantissa is that of TF32.
        self.wide, self.wide_precision = v.dtype, dot_precision(v.dtype)
        if v.dtype == torch.float16 and self.gate == "channel":
            self.wide = torch.float32
            self.wide_precision = "tf32" if generation().startswith("sm_") else "ieee"

    def _has_blocks_with_output(self) -> bool:
        wanted = ShapeClass("linear_scan", self.dtype, self.keys, self.values, f"output, {self.variant}")
        return any(row.variant.startswith("output") for row in rows_for(wanted, generation()))

    @property
    def variant(self) -> str:
        """Decay and rule."""
        return f"{self.gate}, {'delta' if self.delta else 'add'}"

    def config(self, kernel: Any, used: tuple[str, ...]) -> Config:
        """Blocks of a kernel, no wider than the dims are."""
        name = kernel.fn.__name__
        variant = f"output, {self.variant}" if kernel is linear_scan and self.fuses else self.variant
        # Of decays per channel, linear_gram multiplies what their powers have scaled.
        dtype = self.wide if kernel is linear_gram else self.dtype
        found = choose(name, generation(), dtype, self.keys, self.values, variant)
        dims = {"BK": self.keys, "BV": self.values}
        if (
            name == "linear_gradients"
            and self.gate != "channel"
            and self.values > 32
            and is_hopper_half(self.dtype)
        ):
            # Of 32 key channels beside wider values, Triton 3.6 makes wrong products there.
            dims["BK"] = max(dims["BK"], 64)
        blocks = {name: min(found.blocks[name], padded(dims[name])) for name in used}
        return replace(found, blocks=blocks)

    def scan(self, held: Any, wide: Any) -> tuple[Any, tuple[str, ...], dict[str, Any]]:
        """The kernel of a scan, its blocks, and what it is told beside: `wide` where keys are."""
        if self.is_wide:
            return wide, ("BK", "BV"), {}
        return held, ("BV",), {"DELTA": self.delta, "KP": padded(self.keys)}

    def of_scan(self, kernel: Any, blocks: tuple[str, ...]) -> tuple[int, int]:
        """Its grid."""
        return self.sequences * self.heads, -(-self.values // self.config(kernel, blocks).blocks["BV"])

    @property
    def constants(self) -> dict[str, Any]:
        return {"G": self.heads, "VARLEN": self.cu is not None, "C": CHUNK}

    def run(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, blocks: tuple[str, ...] = (), **constants: Any
    ) -> None:
        """Launch a kernel that takes the sequences' bounds and the lengths at its end."""
        is_scan = kernel in SCANS
        places = (self.cu, self.offsets if is_scan else self.table)
        rows = (self.batch * self.length,) if kernel is linear_gradients else ()
        ends = (self.length, self.chunks)
        config = self.config(kernel, blocks)
        launch(kernel, grid, *args, *places, *rows, *ends, config=config, **self.constants, **constants)


def padded(size: int) -> int:
    """The next power of two that a product of matrices can have."""
    return max(16, 1 << (size - 1).bit_length())


def forward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, and what backward needs: sums, scaled q and k, P, M, U and the states before the chunks.

    What a rule or decay does not have is empty, and all of it where it is not to be kept.
    """
    check_device(q=q, k=k, v=v, decay=decay, beta=beta, state=state, cu_seqlens=cu_seqlens)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    decay, beta, state = (None if x is None else x.contiguous() for x in (decay, beta, state))
    shape = Shape(q, v, decay, beta, cu_seqlens)
    common = {"K": shape.keys, "GATE": GATES[shape.gate]}
    value, precision = {"V": shape.values}, dot_precision(shape.dtype)
    cells = (shape.batch, shape.length, shape.heads)
    scaled = [q.new_empty(*cells, shape.keys) for _ in range(3)] if shape.gate == "channel" else []
    # What a later kernel reads.
    has_later = keeps or not shape.fuses
    has_sums = shape.sums and (has_later or shape.has_gram)
    sums = q.new_empty(decay.shape, dtype=torch.float32) if has_sums and decay is not None else None
    pairs = q.new_empty(*cells, CHUNK) if has_later or shape.has_gram else None
    system = q.new_empty(*cells, CHUNK, dtype=torch.float32) if shape.delta else None
    inverse = q.new_empty(*cells, CHUNK) if shape.delta else None
    u = torch.empty_like(v) if shape.delta and has_later else None
    states = None
    if has_later:
        of_states = (shape.chunks * shape.batch, shape.heads, shape.keys, shape.values)
        states = q.new_empty(of_states, dtype=shape.of_states)
    final = q.new_empty(shape.sequences, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    o = torch.empty_like(v)
    each_chunk = (shape.batch * shape.heads, shape.chunks)
    if shape.has_gram:
        shape.run(
            linear_gram, each_chunk, q, k, decay, beta, sums, *(scaled or (None, None, None)), pairs, system,
            blocks=("BK",), **common, H=shape.key_heads, DELTA=shape.delta, SUB=BLOCK, WIDE=TYPES[shape.wide],
            PRECISION=shape.wide_precision,
        )  # fmt: skip
    if shape.delta:
        solve = dot_precision(torch.float32)
        shape.run(linear_solve, each_chunk, system, inverse, SUB=BLOCK, PRECISION=solve)
    q_read, k_read, k_write = scaled or (q, k, k)
    kernel, blocks, how = shape.scan(linear_scan, linear_scan_wide)
    output = () if shape.is_wide else (q_read, pairs, o) if shape.fuses else (None, None, None)
    shape.run(
        kernel, shape.of_scan(kernel, blocks), *output,
        k_read, k_write, v, decay, beta, sums, inverse, u, states, state, final, blocks=blocks,
        **common, **value, **how, H=shape.read_heads, PRECISION=precision,
    )  # fmt: skip
    if not shape.fuses:
        wide = shape.config(linear_output, ("BK", "BV")).blocks["BV"]
        shape.run(
            linear_output, (*each_chunk, -(-shape.values // wide)),
            q_read, k, decay, sums, pairs, v if u is None else u, states, o, blocks=("BK", "BV"),
            **common, **value, H=shape.read_heads, GRAM=not shape.has_gram, PRECISION=precision,
        )  # fmt: skip
    kept = (sums, *(scaled or (None, None, None)), pairs, inverse, u, states) if keeps else (None,) * 8
    # An operation of torch returns tensors: what there is not is empty.
    return o, final, *(_or_empty(q, x) for x in kept)  # type: ignore[return-value]


def backward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    sums: Tensor,
    q_read: Tensor,
    k_read: Tensor,
    k_write: Tensor,
    pairs: Tensor,
    inverse: Tensor,
    u: Tensor,
    states: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    of_decay: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay, beta and the first state, from those of o and the last state.

    What has none is empty; that of the decay also where it is not wanted, as of constants.
    """
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    decay, beta, dfinal = (None if x is None else x.contiguous() for x in (decay, beta, dfinal))
    shape = Shape(q, v, decay, beta, cu_seqlens)
    common = {"K": shape.keys, "GATE": GATES[shape.gate]}
    value, precision = {"V": shape.values}, dot_precision(shape.dtype)
    kept_sums = sums if shape.sums else None
    scaled = (q_read, k_read, k_write) if shape.gate == "channel" else (q, k, k)
    kept_u = u if shape.delta else v
    cells = (shape.batch, shape.length, shape.heads)
    dx, dstates = torch.empty_like(v), torch.empty_like(states)
    dfirst = q.new_empty(shape.sequences, shape.heads, shape.keys, shape.values, dtype=torch.float32)
    kernel, blocks, how = shape.scan(linear_scan_backward, linear_scan_backward_wide)
    shape.run(
        kernel, shape.of_scan(kernel, blocks),
        *scaled, decay, beta, kept_sums, pairs, inverse if shape.delta else None, do, dx, dstates, dfinal, dfirst,
        blocks=blocks, **common, **value, **how, H=shape.read_heads, PRECISION=precision,
    )  # fmt: skip
    dpairs = q.new_empty(*cells, CHUNK, dtype=shape.wide)
    dsystem = torch.empty_like(dpairs) if shape.delta else None
    each_chunk = (shape.batch * shape.heads, shape.chunks)
    wide = shape.config(linear_gradients, ("BK", "BV")).blocks["BK"]
    parts = -(-shape.keys // wide)
    dbeta = q.new_empty(1 + parts if parts > 1 else 1, *cells, dtype=torch.float32) if shape.delta else None
    dv = torch.empty_like(v) if shape.delta else dx
    shape.run(
        linear_pairs_backward, each_chunk,
        v if shape.delta else None, decay, beta, kept_sums, kept_u, do,
        dx if shape.delta else None, dv if shape.delta else None, dbeta, dpairs, dsystem,
        blocks=("BV",), GATE=common["GATE"], DELTA=shape.delta, **value, PRECISION=precision,
    )  # fmt: skip
    # Value heads that share a key head add their gradients, in float32.
    is_shared = shape.heads > shape.key_heads
    dq = q.new_empty(*cells, shape.keys, dtype=torch.float32 if is_shared else q.dtype)
    dk = torch.empty_like(dq)
    dlog = None
    if shape.gate != "none" and of_decay:
        of_log = {
            "head": (parts, shape.chunks, shape.batch, shape.heads),
            "scalar": (parts, *cells),
            "channel": (*cells, shape.keys),
        }
        dlog = q.new_empty(of_log[shape.gate], dtype=torch.float32)
    shape.run(
        linear_gradients, (*each_chunk, parts),
        q, k, decay, beta, kept_sums, kept_u, states, do, dx if shape.delta else None, dstates, dpairs, dsystem,
        dq, dk, dlog, dbeta,
        blocks=("BK", "BV"), **common, **value, H=shape.key_heads, DELTA=shape.delta,
        SUB=BLOCK, WIDE=TYPES[shape.wide], PRECISION=shape.wide_precision,
    )  # fmt: skip
    if is_shared:
        group = (shape.batch, shape.length, shape.key_heads, shape.heads // shape.key_heads, shape.keys)
        dq, dk = (x.view(group).sum(3).to(q.dtype) for x in (dq, dk))
    if dlog is not None and shape.gate == "head":
        dlog = dlog.sum((0, 1, 2))
    if dlog is not None and shape.gate == "scalar":
        dlog = dlog[0] if parts == 1 else dlog.sum(0)
    dbeta = None if dbeta is None else dbeta[0] if parts == 1 else dbeta.sum(0)
    return dq, dk, dv, _or_empty(q, dlog), _or_empty(q, dbeta), dfirst


def _or_empty(like: Tensor, x: Tensor | None) -> Tensor:
    return like.new_empty(0) if x is None else x


forward = torch.library.custom_op(
    "mixforge::chunked_linear_forward", on_device(forward_kernels), mutates_args=()
)
backward = torch.library.custom_op(
    "mixforge::chunked_linear_backward", on_device(backward_kernels), mutates_args=()
)


@forward.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return forward_kernels(*args)


@backward.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return backward_kernels(*args)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, decay, beta, _, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, decay, beta, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    do, dfinal = grads[:2]
    v, beta = ctx.saved_tensors[2], ctx.saved_tensors[4]
    do = torch.zeros_like(v) if do is None else do
    of_decay = ctx.needs_input_grad[3]
    dq, dk, dv, dlog, dbeta, dfirst = backward(*ctx.saved_tensors, do, dfinal, of_decay)
    return (
        dq, dk, dv, dlog if of_decay else None, None if beta is None else dbeta,
        dfirst if ctx.needs_input_grad[5] else None, None, None,
    )  # fmt: skip


forward.register_autograd(_gradients, setup_context=_keep)


@triton.jit
def linear_step(
    q, k, v, log, beta, state, o,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    ROW: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one head, a block of value channels, a part of the key channels; the state, rows of ROW, in place."""
    bg, block, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    g = bg % G
    channel, value = part * KP + tl.arange(0, KP), block * BV + tl.arange(0, BV)
    in_keys, in_values = channel < K, value < V
    key = (bg // G * H + g // (G // H)) * K + channel
    q_K = tl.load(q + key, mask=in_keys, other=0.0).to(tl.float32)
    k_K = tl.load(k + key, mask=in_keys, other=0.0).to(tl.float32)
    u_V = tl.load(v + bg * V + value, mask=in_values, other=0.0).to(tl.float32)
    matrix = bg * K * ROW + channel[:, None] * ROW + value[None, :]
    in_matrix = in_keys[:, None] & in_values[None, :]
    s_KV = tl.load(state + matrix, mask=in_matrix, other=0.0)
    if GATE == 1:
        s_KV *= tl.exp(tl.load(log + g).to(tl.float32))
    if GATE == 2:
        s_KV *= tl.exp(tl.load(log + bg).to(tl.float32))
    if GATE == 3:
        s_KV *= tl.exp(tl.load(log + bg * K + channel, mask=in_keys, other=0.0).to(tl.float32))[:, None]
    if DELTA:
        u_V = tl.load(beta + bg).to(tl.float32) * (u_V - tl.sum(k_K[:, None] * s_KV, 0))
    s_KV += k_K[:, None] * u_V[None, :]
    tl.store(state + matrix, s_KV, mask=in_matrix)
    o_V = tl.sum(q_K[:, None] * s_KV, 0)
    tl.store(o + (part * tl.num_programs(0) + bg) * V + value, o_V.to(o.dtype.element_ty), mask=in_values)


def step_kernels(
    q: Tensor, k: Tensor, v: Tensor, decay_now: Tensor | None, beta: Tensor | None, state: Tensor
) -> Tensor:
    """o of one token; the state is brought up to date in place."""
    check_device(q=q, k=k, v=v, decay=decay_now, beta=beta, state=state)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    decay_now, beta = (None if x is None else x.contiguous() for x in (decay_now, beta))
    batch, key_heads, keys = q.shape
    heads, values = v.shape[1:]
    gate = "none" if decay_now is None else {1: "head", 2: "scalar", 3: "channel"}[decay_now.dim()]
    if beta is not None and keys > MOST_KEYS_NOW:
        config = choose("linear_step_wide", generation(), v.dtype, keys, values)
        o = torch.empty_like(v)
        launch(
            linear_step_wide, (batch * heads, -(-values // config.blocks["BV"])), q, k, v, decay_now, beta, state, o,
            config=config, H=key_heads, G=heads, K=keys, V=values, GATE=GATES[gate], ROW=state.stride(2),
        )  # fmt: skip
        return o
    found = choose("linear_step", generation(), v.dtype, keys, values)
    config = replace(found, blocks={"BV": min(found.blocks["BV"], padded(values))})
    channels = padded(keys) if keys <= MOST_KEYS_NOW else GROUP
    parts = -(-keys // channels)
    o = v.new_empty(parts, *v.shape, dtype=v.dtype if parts == 1 else torch.float32)
    launch(
        linear_step, (batch * heads, -(-values // config.blocks["BV"]), parts), q, k, v, decay_now, beta, state, o,
        config=config, H=key_heads, G=heads, K=keys, V=values, GATE=GATES[gate], DELTA=beta is not None,
        ROW=state.stride(2), KP=channels,
    )  # fmt: skip
    return o[0] if parts == 1 else o.sum(0).to(v.dtype)


one_step = torch.library.custom_op("mixforge::linear_step", on_device(step_kernels), mutates_args=("state",))


@one_step.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return step_kernels(*args)


def linear_step_triton(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BGV: Tensor,
    decay_now: Tensor | None,
    beta_BG: Tensor | None,
    state_BGKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `linear_step`, in one kernel. Where gradients are wanted, a sequence of one token, which has them.

    Raises ValueError where a shape, dtype or device does not fit.
    """
    decay, beta = decay_now, beta_BG
    if decay is not None and decay.dim() > 1:
        decay = decay[:, None]
    beta = None if beta is None else beta[:, None]
    q, k, v = q_BHK[:, None], k_BHK[:, None], v_BGV[:, None]
    check_arguments(q, k, v, decay, beta, state_BGKV, None)
    check_limits(q, ANY)
    given = (q_BHK, k_BHK, v_BGV, decay_now, beta_BG, state_BGKV)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        o, state = chunked_linear_triton(q, k, v, decay, beta, state_BGKV)
        return o[:, 0], state
    check_rows(state_BGKV)
    return one_step(q_BHK, k_BHK, v_BGV, decay_now, beta_BG, state_BGKV), state_BGKV


def check_rows(state: Tensor) -> None:
    """Raise ValueError for a state that cannot be written in place: rows of one distance, each in one piece."""
    (_, heads, rows, _), row = state.shape, state.stride(2)
    strides = zip(state.shape, state.stride(), (heads * rows * row, rows * row, row, 1), strict=True)
    if state.dtype != torch.float32 or any(size > 1 and found != wanted for size, found, wanted in strides):
        raise ValueError(
            f"state is {state.dtype} with strides {state.stride()}; it must be float32, and contiguous or some of the "
            "columns of one that is"
        )
