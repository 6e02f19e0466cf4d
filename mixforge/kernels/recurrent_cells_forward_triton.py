"""The forward kernels of the cells in `recurrent_cells_triton`, which has the equations."""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


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
