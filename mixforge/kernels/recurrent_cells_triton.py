"""Triton form of the recurrent cells: `recurrent_cells` has the equations.

A program walks all tokens of BLOCK_B sequences of one head. Where the head is narrow enough, its recurrent matrices are
read once and stay in registers or shared memory, as are its states (`cell_forward`); a wider one reads the matrices
again for each token, in blocks, from the cache that all programs share, and leaves its states in memory between tokens
(`cell_forward_wide`). What the input gives the gates of all tokens was multiplied before, and is read one token ahead.

For the backward pass, the gates' values and the sums c and n of each token are kept in float32. It walks from the last
token to the first and leaves the gradients of what R and the input give the gates; those of R and b are products and
sums over all tokens, made by torch afterwards, in a fixed order.

Source: Poeppel et al. 2024 (arXiv 2412.07752, section 3): states and matrices on chip for all tokens, one head a
program, gradients of matrices afterwards. Departures: a head wider than that is not cut over several programs.
"""

# Kernels are written in the language of Triton, whose values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.blocks import choose
from mixforge.kernels.gated_scan_triton import check_dtypes, check_state
from mixforge.kernels.launch import check_device, dot_precision, generation, launch, on_device
from mixforge.kernels.recurrent_cells import CELLS, check_cell, first_state

# Channels of a head whose matrices are held, by the bytes of a number.
HELD = {2: 128, 4: 64}
# Gates' values and sums of a token that backward reads.
KEPT = {"lstm": 5, "gru": 4, "slstm": 7}


@triton.jit
def tanh(x):
    """By an exponential that cannot overflow; near zero by the polynomial of the Cephes library."""
    fall = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - fall) / (1.0 + fall)
    square = x * x
    near = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    near = ((near + 1.33314422036e-1) * square - 3.33332819422e-1) * square * x + x
    return tl.where(square < 0.390625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def sigmoid(x):
    """By an exponential that cannot overflow."""
    fall = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, fall, 1.0) / (1.0 + fall)


@triton.jit
def advance(x0, x1, x2, x3, h, c, n, m, CELL: tl.constexpr):
    """The states after a token, and what backward reads of its gates.

    x are what the gates get, i, f, z and o; of a GRU r, z, what the input gives n, and what R and b give it.
    """
    if CELL == "gru":
        a0 = sigmoid(x0)
        a1 = sigmoid(x1)
        a2 = tanh(x2 + a0 * x3)
        a3 = x3
        a4 = x3
        h = a2 + a1 * (h - a2)
    else:
        a2 = tanh(x2)
        a3 = sigmoid(x3)
        if CELL == "lstm":
            a0 = sigmoid(x0)
            a1 = sigmoid(x1)
            a4 = a3
            c = a1 * c + a0 * a2
            h = a3 * tanh(c)
        else:
            fall = tl.exp(-tl.abs(x1))
            lasting = tl.minimum(x1, 0.0) - tl.log(1.0 + fall) + m
            m = tl.maximum(lasting, x0)
            a0 = tl.exp(x0 - m)
            a1 = tl.exp(lasting - m)
            a4 = tl.where(x1 < 0.0, 1.0, fall) / (1.0 + fall)
            c = a1 * c + a0 * a2
            n = a1 * n + a0
            h = a3 * c / n
    return h, c, n, m, a0, a1, a2, a3, a4


@triton.jit
def load_matrix(recurrent_ptr, head, gate, row, column, dim: tl.constexpr, GATES: tl.constexpr):
    """Rows and columns of one gate's matrix of a head; zeros outside."""
    offsets = row * (GATES * dim) + gate * dim + column
    return tl.load(
        recurrent_ptr + head.to(tl.int64) * (dim * GATES * dim) + offsets,
        mask=(row < dim) & (column < dim),
        other=0.0,
    )


@triton.jit
def load_gates(pointer, mask, dim: tl.constexpr, CELL: tl.constexpr):
    """What the input gives each gate of a token; a GRU has three."""
    x0 = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(pointer + dim, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(pointer + 2 * dim, mask=mask, other=0.0).to(tl.float32)
    x3 = x2
    if CELL != "gru":
        x3 = tl.load(pointer + 3 * dim, mask=mask, other=0.0).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def load_states(pointer, mask, step: tl.constexpr, CELL: tl.constexpr):
    """h, c, n and m, which lie `step` numbers apart, as far as the cell has them."""
    h = tl.load(pointer, mask=mask, other=0.0)
    c = h
    n = h
    m = h
    if CELL != "gru":
        c = tl.load(pointer + step, mask=mask, other=0.0)
    if CELL == "slstm":
        n = tl.load(pointer + 2 * step, mask=mask, other=0.0)
        m = tl.load(pointer + 3 * step, mask=mask, other=0.0)
    return h, c, n, m


@triton.jit
def store_states(pointer, h, c, n, m, mask, step: tl.constexpr, CELL: tl.constexpr):
    tl.store(pointer, h, mask=mask)
    if CELL != "gru":
        tl.store(pointer + step, c, mask=mask)
    if CELL == "slstm":
        tl.store(pointer + 2 * step, n, mask=mask)
        tl.store(pointer + 3 * step, m, mask=mask)


@triton.jit
def store_kept(pointer, a0, a1, a2, a3, a4, c, n, mask, dim: tl.constexpr, CELL: tl.constexpr):
    tl.store(pointer, a0, mask=mask)
    tl.store(pointer + dim, a1, mask=mask)
    tl.store(pointer + 2 * dim, a2, mask=mask)
    tl.store(pointer + 3 * dim, a3, mask=mask)
    if CELL != "gru":
        tl.store(pointer + 4 * dim, c, mask=mask)
    if CELL == "slstm":
        tl.store(pointer + 5 * dim, n, mask=mask)
        tl.store(pointer + 6 * dim, a4, mask=mask)


@triton.jit(do_not_specialize=["length", "batch"])
def cell_forward(
    gates_ptr, recurrent_ptr, bias_ptr, state_ptr, h_ptr, final_ptr, kept_ptr, length, batch,
    heads: tl.constexpr, dim: tl.constexpr, CELL: tl.constexpr, STATES: tl.constexpr, KEPT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """All tokens of one head of some sequences; the matrices are held."""
    head = tl.program_id(0)
    row_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    column_K = tl.arange(0, WIDE)
    mask = (row_B < batch)[:, None] & (column_K < dim)[None, :]
    GATES: tl.constexpr = 3 if CELL == "gru" else 4
    low: tl.constexpr = gates_ptr.dtype.element_ty
    step: tl.constexpr = heads * dim
    first_B = row_B.to(tl.int64)
    states = (first_B * (STATES * step) + head * dim)[:, None] + column_K[None, :]
    place = first_B * length * heads + head
    gates = gates_ptr + (place * (GATES * dim))[:, None] + column_K[None, :]
    outputs = h_ptr + (place * dim)[:, None] + column_K[None, :]
    if kept_ptr is not None:
        kept = kept_ptr + (place * (KEPT * dim))[:, None] + column_K[None, :]
    across, down = column_K[None, :], column_K[:, None]
    r0 = load_matrix(recurrent_ptr, head, 0, down, across, dim, GATES)
    r1 = load_matrix(recurrent_ptr, head, 1, down, across, dim, GATES)
    r2 = load_matrix(recurrent_ptr, head, 2, down, across, dim, GATES)
    if CELL == "gru":
        bias = tl.load(bias_ptr + head * dim + column_K, mask=column_K < dim, other=0.0).to(tl.float32)
    else:
        r3 = load_matrix(recurrent_ptr, head, 3, down, across, dim, GATES)
    h, c, n, m = load_states(state_ptr + states, mask, step, CELL)
    x0, x1, x2, x3 = load_gates(gates, mask, dim, CELL)
    for t in range(length):
        gates += step * GATES
        next0, next1, next2, next3 = load_gates(gates, mask & (t + 1 < length), dim, CELL)
        given = h.to(low)
        x0 += tl.dot(given, r0, input_precision=PRECISION)
        x1 += tl.dot(given, r1, input_precision=PRECISION)
        own = tl.dot(given, r2, input_precision=PRECISION)
        if CELL == "gru":
            x3 = own + bias[None, :]
        else:
            x2 += own
            x3 += tl.dot(given, r3, input_precision=PRECISION)
        h, c, n, m, a0, a1, a2, a3, a4 = advance(x0, x1, x2, x3, h, c, n, m, CELL)
        tl.store(outputs, h.to(low), mask=mask)
        outputs += step
        if kept_ptr is not None:
            store_kept(kept, a0, a1, a2, a3, a4, c, n, mask, dim, CELL)
            kept += step * KEPT
        x0, x1, x2, x3 = next0, next1, next2, next3
    store_states(final_ptr + states, h, c, n, m, mask, step, CELL)


@triton.jit(do_not_specialize=["length", "batch", "blocks"])
def cell_forward_wide(
    gates_ptr, recurrent_ptr, bias_ptr, outputs_ptr, final_ptr, kept_ptr, length, batch, blocks,
    heads: tl.constexpr, dim: tl.constexpr, CELL: tl.constexpr, STATES: tl.constexpr, KEPT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All tokens of one head of some sequences; or, of one token, some `blocks` of columns.

    `outputs` [B, 1+T, H, K] begins with the h before. `final` holds the states before and is brought up to date.
    """
    head = tl.program_id(0)
    row_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = tl.program_id(2) * blocks
    in_batch = (row_B < batch)[:, None]
    GATES: tl.constexpr = 3 if CELL == "gru" else 4
    low: tl.constexpr = gates_ptr.dtype.element_ty
    step: tl.constexpr = heads * dim
    first_B = row_B.to(tl.int64)
    for t in range(length):
        place = (first_B * length + t) * heads + head
        past = outputs_ptr + (((first_B * (length + 1) + t) * heads + head) * dim)[:, None]
        for block in range(first, tl.minimum(first + blocks, tl.cdiv(dim, BLOCK_K))):
            column_K = block * BLOCK_K + tl.arange(0, BLOCK_K)
            across = column_K[None, :]
            mask = in_batch & (across < dim)
            x0, x1, x2, x3 = load_gates(
                gates_ptr + (place * (GATES * dim))[:, None] + across, mask, dim, CELL
            )
            own = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
            for inner in range(0, dim, BLOCK_K):
                row_K = inner + tl.arange(0, BLOCK_K)
                there = in_batch & (row_K < dim)[None, :]
                given = tl.load(past + row_K[None, :], mask=there, other=0.0)
                down = row_K[:, None]
                r0 = load_matrix(recurrent_ptr, head, 0, down, across, dim, GATES)
                x0 = tl.dot(given, r0, x0, input_precision=PRECISION)
                r1 = load_matrix(recurrent_ptr, head, 1, down, across, dim, GATES)
                x1 = tl.dot(given, r1, x1, input_precision=PRECISION)
                r2 = load_matrix(recurrent_ptr, head, 2, down, across, dim, GATES)
                own = tl.dot(given, r2, own, input_precision=PRECISION)
                if CELL != "gru":
                    r3 = load_matrix(recurrent_ptr, head, 3, down, across, dim, GATES)
                    x3 = tl.dot(given, r3, x3, input_precision=PRECISION)
            if CELL == "gru":
                bias = tl.load(bias_ptr + head * dim + column_K, mask=column_K < dim, other=0.0).to(
                    tl.float32
                )
                x3 = own + bias[None, :]
            else:
                x2 += own
            states = final_ptr + (first_B * (STATES * step) + head * dim)[:, None] + across
            h, c, n, m = load_states(states, mask, step, CELL)
            h, c, n, m, a0, a1, a2, a3, a4 = advance(x0, x1, x2, x3, h, c, n, m, CELL)
            tl.store(past + step + across, h.to(low), mask=mask)
            store_states(states, h, c, n, m, mask, step, CELL)
            if kept_ptr is not None:
                kept = kept_ptr + (place * (KEPT * dim))[:, None] + across
                store_kept(kept, a0, a1, a2, a3, a4, c, n, mask, dim, CELL)
        # What one thread left of this token, others read for the next.
        tl.debug_barrier()


@triton.jit
def retreat(a0, a1, a2, a3, a4, past_c, past_n, c, n, dh, dc, dn, CELL: tl.constexpr):
    """Gradients of what the gates get, of the h before where it is used as it is, and of the c and n before.

    a are what `advance` left; past_c is h for a GRU. The last of a GRU's gates is what R and b give n.
    """
    dpast = tl.zeros_like(dh)
    if CELL == "gru":
        d2 = dh * (1.0 - a1) * (1.0 - a2 * a2)
        d1 = dh * (past_c - a2) * a1 * (1.0 - a1)
        d0 = d2 * a3 * a0 * (1.0 - a0)
        d3 = d2 * a0
        dpast = dh * a1
    elif CELL == "lstm":
        out = tanh(c)
        d3 = dh * out * a3 * (1.0 - a3)
        dc += dh * a3 * (1.0 - out * out)
        d0 = dc * a2 * a0 * (1.0 - a0)
        d1 = dc * past_c * a1 * (1.0 - a1)
        d2 = dc * a0 * (1.0 - a2 * a2)
        dc = dc * a1
    else:
        share = dh * a3 / n
        mean = c / n
        d3 = share * c * (1.0 - a3)
        dc += share
        dn -= share * mean
        d0 = (dc * a2 + dn) * a0
        d2 = dc * a0 * (1.0 - a2 * a2)
        dc = dc * a1
        dn = dn * a1
        d1 = (dc * past_c + dn * past_n) * a4
    return d0, d1, d2, d3, dpast, dc, dn


@triton.jit
def load_kept(pointer, mask, dim: tl.constexpr, CELL: tl.constexpr):
    """The gates' values of a token."""
    a0 = tl.load(pointer, mask=mask, other=0.0)
    a1 = tl.load(pointer + dim, mask=mask, other=0.0)
    a2 = tl.load(pointer + 2 * dim, mask=mask, other=0.0)
    a3 = tl.load(pointer + 3 * dim, mask=mask, other=0.0)
    a4 = a3
    if CELL == "slstm":
        a4 = tl.load(pointer + 6 * dim, mask=mask, other=0.0)
    return a0, a1, a2, a3, a4


@triton.jit
def load_sums(kept, outputs, mask, dim: tl.constexpr, CELL: tl.constexpr):
    """c and n behind a token; of a GRU its h. An n outside the mask is 1, for it divides."""
    if CELL == "gru":
        c = tl.load(outputs, mask=mask, other=0.0).to(tl.float32)
        n = c
    else:
        c = tl.load(kept + 4 * dim, mask=mask, other=0.0)
        n = c
        if CELL == "slstm":
            n = tl.load(kept + 5 * dim, mask=mask, other=1.0)
    return c, n


@triton.jit(do_not_specialize=["length", "batch"])
def cell_backward(
    recurrent_ptr, state_ptr, h_ptr, kept_ptr, dh_ptr, dfinal_ptr, dgates_ptr, down_ptr, dstate_ptr, length, batch,
    heads: tl.constexpr, dim: tl.constexpr, CELL: tl.constexpr, STATES: tl.constexpr, KEPT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """All tokens of one head of some sequences, last to first; the matrices are held.

    `down` is the gradient of what R and b give n of a GRU.
    """
    head = tl.program_id(0)
    row_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    column_K = tl.arange(0, WIDE)
    mask = (row_B < batch)[:, None] & (column_K < dim)[None, :]
    GATES: tl.constexpr = 3 if CELL == "gru" else 4
    low: tl.constexpr = h_ptr.dtype.element_ty
    step: tl.constexpr = heads * dim
    first_B = row_B.to(tl.int64)
    states = (first_B * (STATES * step) + head * dim)[:, None] + column_K[None, :]
    place = (first_B * length + length - 1) * heads + head
    outputs = (place * dim)[:, None] + column_K[None, :]
    dgates = dgates_ptr + (place * (GATES * dim))[:, None] + column_K[None, :]
    kept = kept_ptr + (place * (KEPT * dim))[:, None] + column_K[None, :]
    across, down = column_K[None, :], column_K[:, None]
    r0 = load_matrix(recurrent_ptr, head, 0, down, across, dim, GATES)
    r1 = load_matrix(recurrent_ptr, head, 1, down, across, dim, GATES)
    r2 = load_matrix(recurrent_ptr, head, 2, down, across, dim, GATES)
    if CELL != "gru":
        r3 = load_matrix(recurrent_ptr, head, 3, down, across, dim, GATES)
    first_h, first_c, first_n, _ = load_states(state_ptr + states, mask, step, CELL)
    dh = tl.zeros_like(first_h)
    dc = tl.zeros_like(first_h)
    dn = tl.zeros_like(first_h)
    if dfinal_ptr is not None:
        dh, dc, dn, _ = load_states(dfinal_ptr + states, mask, step, CELL)
    c, n = load_sums(kept, h_ptr + outputs, mask, dim, CELL)
    for back in range(length):
        is_later = back + 1 < length
        dh += tl.load(dh_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
        a0, a1, a2, a3, a4 = load_kept(kept, mask, dim, CELL)
        outputs -= step
        kept -= step * KEPT
        past_c, past_n = load_sums(kept, h_ptr + outputs, mask & is_later, dim, CELL)
        past_c = tl.where(is_later, past_c, first_c)
        past_n = tl.where(is_later, past_n, first_n)
        d0, d1, d2, d3, dh, dc, dn = retreat(a0, a1, a2, a3, a4, past_c, past_n, c, n, dh, dc, dn, CELL)
        low0, low1, low2, low3 = d0.to(low), d1.to(low), d2.to(low), d3.to(low)
        tl.store(dgates, low0, mask=mask)
        tl.store(dgates + dim, low1, mask=mask)
        tl.store(dgates + 2 * dim, low2, mask=mask)
        dh = tl.dot(low0, tl.trans(r0), dh, input_precision=PRECISION)
        dh = tl.dot(low1, tl.trans(r1), dh, input_precision=PRECISION)
        if CELL == "gru":
            tl.store(down_ptr + outputs + step, low3, mask=mask)
            dh = tl.dot(low3, tl.trans(r2), dh, input_precision=PRECISION)
        else:
            tl.store(dgates + 3 * dim, low3, mask=mask)
            dh = tl.dot(low2, tl.trans(r2), dh, input_precision=PRECISION)
            dh = tl.dot(low3, tl.trans(r3), dh, input_precision=PRECISION)
        dgates -= step * GATES
        c, n = past_c, past_n
    store_states(dstate_ptr + states, dh, dc, dn, dc * first_c + dn * first_n, mask, step, CELL)


@triton.jit(do_not_specialize=["length", "batch"])
def cell_backward_wide(
    recurrent_ptr, state_ptr, h_ptr, kept_ptr, dh_ptr, dgates_ptr, down_ptr, dstate_ptr, length, batch,
    heads: tl.constexpr, dim: tl.constexpr, CELL: tl.constexpr, STATES: tl.constexpr, KEPT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All tokens of one head of some sequences, last to first.

    `dstate` holds the gradients of the last states, and those of the states before in the end.
    """
    head = tl.program_id(0)
    row_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_batch = (row_B < batch)[:, None]
    GATES: tl.constexpr = 3 if CELL == "gru" else 4
    low: tl.constexpr = h_ptr.dtype.element_ty
    step: tl.constexpr = heads * dim
    first_B = row_B.to(tl.int64)
    states = (first_B * (STATES * step) + head * dim)[:, None]
    for back in range(length):
        t = length - 1 - back
        place = (first_B * length + t) * heads + head
        outputs = (place * dim)[:, None]
        dgates = dgates_ptr + (place * (GATES * dim))[:, None]
        for start in range(0, dim, BLOCK_K):
            across = (start + tl.arange(0, BLOCK_K))[None, :]
            mask = in_batch & (across < dim)
            kept = kept_ptr + (place * (KEPT * dim))[:, None] + across
            a0, a1, a2, a3, a4 = load_kept(kept, mask, dim, CELL)
            c, n = load_sums(kept, h_ptr + outputs + across, mask, dim, CELL)
            past_c, past_n = load_sums(
                kept - step * KEPT, h_ptr + outputs - step + across, mask & (t > 0), dim, CELL
            )
            if t == 0:
                _, past_c, past_n, _ = load_states(state_ptr + states + across, mask, step, CELL)
            dh, dc, dn, _ = load_states(dstate_ptr + states + across, mask, step, CELL)
            dh += tl.load(dh_ptr + outputs + across, mask=mask, other=0.0).to(tl.float32)
            d0, d1, d2, d3, dh, dc, dn = retreat(a0, a1, a2, a3, a4, past_c, past_n, c, n, dh, dc, dn, CELL)
            tl.store(dgates + across, d0.to(low), mask=mask)
            tl.store(dgates + dim + across, d1.to(low), mask=mask)
            tl.store(dgates + 2 * dim + across, d2.to(low), mask=mask)
            if CELL == "gru":
                tl.store(down_ptr + outputs + across, d3.to(low), mask=mask)
            else:
                tl.store(dgates + 3 * dim + across, d3.to(low), mask=mask)
            dm = dc * past_c + dn * past_n
            store_states(dstate_ptr + states + across, dh, dc, dn, dm, mask, step, CELL)
        tl.debug_barrier()
        for start in range(0, dim, BLOCK_K):
            row_K = start + tl.arange(0, BLOCK_K)
            mask = in_batch & (row_K < dim)[None, :]
            dh = tl.load(dstate_ptr + states + row_K[None, :], mask=mask, other=0.0)
            for inner in range(0, dim, BLOCK_K):
                across = (inner + tl.arange(0, BLOCK_K))[None, :]
                there = in_batch & (across < dim)
                r0 = load_matrix(recurrent_ptr, head, 0, row_K[:, None], across, dim, GATES)
                d0 = tl.load(dgates + across, mask=there, other=0.0)
                dh = tl.dot(d0, tl.trans(r0), dh, input_precision=PRECISION)
                r1 = load_matrix(recurrent_ptr, head, 1, row_K[:, None], across, dim, GATES)
                d1 = tl.load(dgates + dim + across, mask=there, other=0.0)
                dh = tl.dot(d1, tl.trans(r1), dh, input_precision=PRECISION)
                r2 = load_matrix(recurrent_ptr, head, 2, row_K[:, None], across, dim, GATES)
                if CELL == "gru":
                    d2 = tl.load(down_ptr + outputs + across, mask=there, other=0.0)
                else:
                    d2 = tl.load(dgates + 2 * dim + across, mask=there, other=0.0)
                dh = tl.dot(d2, tl.trans(r2), dh, input_precision=PRECISION)
                if CELL != "gru":
                    r3 = load_matrix(recurrent_ptr, head, 3, row_K[:, None], across, dim, GATES)
                    d3 = tl.load(dgates + 3 * dim + across, mask=there, other=0.0)
                    dh = tl.dot(d3, tl.trans(r3), dh, input_precision=PRECISION)
            tl.store(dstate_ptr + states + row_K[None, :], dh, mask=mask)
        tl.debug_barrier()


def padded(dim: int) -> int:
    """The side of a head's tiles: products take 16 at least."""
    return max(16, int(triton.next_power_of_2(dim)))


def run_forward(
    cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last states, and what backward reads, which is empty where it is not kept."""
    check_device(gates=gates, recurrent=recurrent, bias=bias, state=state)
    h, final, kept = empty_forward(cell, gates, recurrent, bias, state, keep)
    launch_forward(cell, gates, recurrent, bias, state, h, final, kept if keep else None)
    return h, final, kept


def launch_forward(
    cell: str,
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor,
    h: Tensor,
    final: Tensor,
    kept: Tensor | None,
) -> None:
    """Write h, the last states and what is kept. `final` may be `state`."""
    batch, length = gates.shape[:2]
    heads, dim = recurrent.shape[:2]
    if is_held(gates.dtype, dim):
        config = choose("cell_forward", generation(), gates.dtype, key=dim)
        launch(
            cell_forward, (heads, -(-batch // config.blocks["BLOCK_B"])),
            gates, recurrent, bias, state, h, final, kept, length, batch,
            config=config, WIDE=padded(dim), **constants(cell, recurrent),
        )  # fmt: skip
        return
    config = choose("cell_forward_wide", generation(), gates.dtype, key=dim)
    # The columns of a single token wait for no others.
    blocks = -(-dim // config.blocks["BLOCK_K"])
    each = 1 if length == 1 else blocks
    outputs = h.new_empty(batch, length + 1, heads, dim)
    outputs[:, 0] = state[:, 0]
    if final is not state:
        final.copy_(state)
    launch(
        cell_forward_wide, (heads, -(-batch // config.blocks["BLOCK_B"]), -(-blocks // each)),
        gates, recurrent, bias, outputs, final, kept, length, batch, each,
        config=config, **constants(cell, recurrent),
    )  # fmt: skip
    h.copy_(outputs[:, 1:])


def is_held(dtype: torch.dtype, dim: int) -> bool:
    """Whether the matrices of a head are held for all tokens."""
    return dim <= HELD[dtype.itemsize]


def constants(cell: str, recurrent: Tensor) -> dict[str, Any]:
    """What is known of both passes when they are compiled."""
    heads, dim = recurrent.shape[:2]
    return {
        "heads": heads,
        "dim": dim,
        "CELL": cell,
        "STATES": len(CELLS[cell].first),
        "KEPT": KEPT[cell],
        "PRECISION": dot_precision(recurrent.dtype),
    }


def empty_forward(
    cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last states and what is kept, not yet written."""
    batch, length, heads, _ = gates.shape
    dim = recurrent.shape[1]
    kept = (batch, length, heads, KEPT[cell], dim) if keep else (0,)
    return (
        gates.new_empty(batch, length, heads, dim),
        torch.empty_like(state),
        gates.new_empty(kept, dtype=torch.float32),
    )


def run_backward(
    cell: str,
    recurrent: Tensor,
    state: Tensor,
    h: Tensor,
    kept: Tensor,
    dh: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates, of what R and b give n of a GRU (otherwise empty), and of the first states."""
    dgates, down, dstate = empty_backward(cell, recurrent, state, h, kept, dh, dfinal)
    batch, length, heads, dim = h.shape
    of_n = down if cell == "gru" else None
    if is_held(h.dtype, dim):
        config = choose("cell_backward", generation(), h.dtype, key=dim)
        launch(
            cell_backward, (heads, -(-batch // config.blocks["BLOCK_B"])),
            recurrent, state, h, kept, dh, dfinal, dgates, of_n, dstate, length, batch,
            config=config, WIDE=padded(dim), **constants(cell, recurrent),
        )  # fmt: skip
        return dgates, down, dstate
    config = choose("cell_backward_wide", generation(), h.dtype, key=dim)
    if dfinal is None:
        dstate.zero_()
    else:
        dstate.copy_(dfinal)
    launch(
        cell_backward_wide, (heads, -(-batch // config.blocks["BLOCK_B"])),
        recurrent, state, h, kept, dh, dgates, of_n, dstate, length, batch,
        config=config, **constants(cell, recurrent),
    )  # fmt: skip
    return dgates, down, dstate


def empty_backward(
    cell: str,
    recurrent: Tensor,
    state: Tensor,
    h: Tensor,
    kept: Tensor,
    dh: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, not yet written."""
    dgates = h.new_empty(*h.shape[:3], recurrent.shape[2])
    return dgates, torch.empty_like(h) if cell == "gru" else h.new_empty(0), torch.empty_like(state)


_forward = torch.library.custom_op(
    "mixforge::recurrent_cell_forward", on_device(run_forward), mutates_args=()
)


_backward = torch.library.custom_op(
    "mixforge::recurrent_cell_backward", on_device(run_backward), mutates_args=()
)


@_forward.register_fake
def _(
    cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Tensors of the meta device get this far only where launches are written down.
    made = run_forward if gates.device.type == "meta" else empty_forward
    return made(cell, gates, recurrent, bias, state, keep)


@_backward.register_fake
def _(
    cell: str,
    recurrent: Tensor,
    state: Tensor,
    h: Tensor,
    kept: Tensor,
    dh: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    made = run_backward if h.device.type == "meta" else empty_backward
    return made(cell, recurrent, state, h, kept, dh, dfinal)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.cell, _, recurrent, bias, state, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(recurrent, state, output[0], output[2])
    # A gradient of what is kept would be as large as it is, and zero.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dh: Tensor | None, dfinal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    recurrent, state, h, kept = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dgates, down, dstate = _backward(ctx.cell, recurrent, state, h, kept, dh, dfinal)
    past_HKN = torch.cat([state[:, :1].to(h.dtype), h[:, :-1]], 1).permute(2, 3, 0, 1).flatten(2)
    given, dbias = dgates, None
    if ctx.bias_dtype is not None:
        given = torch.cat([dgates[..., : 2 * h.shape[3]], down], -1)
        dbias = down.sum((0, 1), dtype=torch.float32).to(ctx.bias_dtype)
    drecurrent = torch.bmm(past_HKN, given.permute(2, 0, 1, 3).flatten(1, 2))
    return None, dgates, drecurrent, dbias, dstate, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def run_step(cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """h of one token; the state, which must be contiguous, is brought up to date in place."""
    check_device(gates=gates, recurrent=recurrent, bias=bias, state=state)
    h = gates.new_empty(gates.shape[0], *recurrent.shape[:2])
    launch_forward(cell, gates[:, None], recurrent, bias, state, h[:, None], state, None)
    return h


_step = torch.library.custom_op("mixforge::recurrent_cell_step", on_device(run_step), mutates_args=("state",))


@_step.register_fake
def _(cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    if gates.device.type == "meta":
        return run_step(cell, gates, recurrent, bias, state)
    return gates.new_empty(gates.shape[0], *recurrent.shape[:2])


def run(
    cell: str, gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A sequence of a cell by its name."""
    check_cell(CELLS[cell], gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    check_dtypes(gates=gates_BTHF)
    if state_BSHK is None:
        state_BSHK = first_state(CELLS[cell], gates_BTHF, recurrent_HKF)
    keep = wants_gradient(gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    weights = prepared(gates_BTHF, recurrent_HKF, bias_HK)
    h_BTHK, final_BSHK, _ = _forward(cell, *weights, state_BSHK.float().contiguous(), keep)
    return h_BTHK, final_BSHK


def run_token(
    cell: str, gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """A token of a cell by its name: in place, or where a gradient is wanted, as a sequence of one."""
    check_cell(CELLS[cell], gates_BHF[:, None], recurrent_HKF, bias_HK, state_BSHK)
    check_dtypes(gates=gates_BHF)
    if wants_gradient(gates_BHF, recurrent_HKF, bias_HK, state_BSHK):
        h_BTHK, final_BSHK = run(cell, gates_BHF[:, None], recurrent_HKF, bias_HK, state_BSHK)
        return h_BTHK[:, 0], final_BSHK
    check_state(state_BSHK, state_BSHK.shape)
    h_BHK: Tensor = _step(cell, *prepared(gates_BHF, recurrent_HKF, bias_HK), state_BSHK)
    return h_BHK, state_BSHK


def wants_gradient(*given: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def prepared(gates: Tensor, recurrent: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contiguous, the matrices in the dtype of the gates."""
    bias = None if bias is None else bias.contiguous()
    return gates.contiguous(), recurrent.to(gates.dtype).contiguous(), bias


def lstm_triton(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `lstm_reference`, on a GPU. Products have operands of the gates' dtype."""
    return run("lstm", gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)


def gru_triton(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `gru_reference`, on a GPU. Products have operands of the gates' dtype."""
    return run("gru", gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)


def slstm_triton(
    gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None = None, state_BSHK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `slstm_reference`, on a GPU. Products have operands of the gates' dtype."""
    return run("slstm", gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)


def lstm_step_triton(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """As `lstm_step`, in one kernel. The state must be float32 and contiguous."""
    return run_token("lstm", gates_BHF, recurrent_HKF, bias_HK, state_BSHK)


def gru_step_triton(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """As `gru_step`, in one kernel. The state must be float32 and contiguous."""
    return run_token("gru", gates_BHF, recurrent_HKF, bias_HK, state_BSHK)


def slstm_step_triton(
    gates_BHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor
) -> tuple[Tensor, Tensor]:
    """As `slstm_step`, in one kernel. The state must be float32 and contiguous."""
    return run_token("slstm", gates_BHF, recurrent_HKF, bias_HK, state_BSHK)
