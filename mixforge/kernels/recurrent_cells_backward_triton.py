"""The backward kernels of the cells in `recurrent_cells_triton`, which has the equations."""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from mixforge.kernels.recurrent_cells_forward_triton import load_matrix, load_states, store_states, tanh


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
