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
    offsets = (head * dim + row) * (GATES * dim) + gate * dim + column
    return tl.load(recurrent_ptr + offsets, mask=(row < dim) & (column < dim), other=0.0)


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


def padded(dim: int) -> int:
    """The side of a head's tiles: products take 16 at least."""
    return max(16, triton.next_power_of_2(dim))


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
    batch, length = gates.shape[:2]
    heads, dim = recurrent.shape[:2]
    constants: dict[str, Any] = {
        "heads": heads,
        "dim": dim,
        "CELL": cell,
        "STATES": len(CELLS[cell].first),
        "KEPT": KEPT[cell],
        "PRECISION": dot_precision(gates.dtype),
    }
    config = choose("cell_forward", generation(), gates.dtype, key=dim)
    grid = (heads, -(-batch // config.blocks["BLOCK_B"]))
    launch(
        cell_forward, grid, gates, recurrent, bias, state, h, final, kept, length, batch,
        config=config, WIDE=padded(dim), **constants,
    )  # fmt: skip


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


_forward = torch.library.custom_op(
    "mixforge::recurrent_cell_forward", on_device(run_forward), mutates_args=()
)


@_forward.register_fake
def _(
    cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Tensors of the meta device get this far only where launches are written down.
    made = run_forward if gates.device.type == "meta" else empty_forward
    return made(cell, gates, recurrent, bias, state, keep)


def run(
    cell: str, gates_BTHF: Tensor, recurrent_HKF: Tensor, bias_HK: Tensor | None, state_BSHK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A sequence of a cell by its name."""
    check_cell(CELLS[cell], gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    check_dtypes(gates=gates_BTHF)
    if state_BSHK is None:
        state_BSHK = first_state(CELLS[cell], gates_BTHF, recurrent_HKF)
    given = (gates_BTHF, recurrent_HKF, bias_HK, state_BSHK)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    h_BTHK, final_BSHK, _ = _forward(
        cell,
        gates_BTHF.contiguous(),
        recurrent_HKF.to(gates_BTHF.dtype).contiguous(),
        None if bias_HK is None else bias_HK.contiguous(),
        state_BSHK.float().contiguous(),
        keep,
    )
    return h_BTHK, final_BSHK


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
