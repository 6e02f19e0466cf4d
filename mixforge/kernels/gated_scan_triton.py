"""Triton form of the elementwise scans: `gated_scan` with real gates, `gated_scan_complex` with complex ones.

A program walks BLOCK_T rows of BLOCK_D channels at a time: an associative scan inside the tile, the state carried
between tiles. Where batch and channels make too few programs, the time is cut into segments: one launch sums up
each segment by its product of gates and its state from zero, and a second scans those of the segments before its
own and then its rows. Only products of gates occur. The backward pass is the same walk from the last row to the
first, with the gate of the row after; d log a_t = a_t h_{t-1} dh_t is formed from the h that forward returned.

Source: Blelloch 1990 (Prefix sums and their applications, section 1.4) for first-order recurrences in blocks.
"""

# Kernels are written in the language of Triton, whose values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.blocks import Config, choose
from mixforge.kernels.gated_scan import check_scan
from mixforge.kernels.gated_scan_complex import check_complex
from mixforge.kernels.launch import check_device, generation, launch, on_device
from mixforge.kernels.packed import sequence_edges

# Programs that keep a large device busy; fewer are made more by cutting the time, which reads the inputs twice.
PROGRAMS = 512


@triton.jit
def compose(gate, value, later_gate, later_value):
    """Two maps h -> gate h + value, one after the other."""
    return gate * later_gate, later_gate * value + later_value


@triton.jit
def compose_complex(gate, gate_i, value, value_i, later, later_i, later_value, later_value_i):
    return (
        gate * later - gate_i * later_i,
        gate * later_i + gate_i * later,
        later * value - later_i * value_i + later_value,
        later * value_i + later_i * value + later_value_i,
    )


@triton.jit
def scan_tile(gate, gate_i, value, value_i, COMPLEX: tl.constexpr):
    """For each row of a tile, the map from the state before the first row to the state behind this one."""
    if COMPLEX:
        gate, gate_i, value, value_i = tl.associative_scan((gate, gate_i, value, value_i), 0, compose_complex)
    else:
        gate, value = tl.associative_scan((gate, value), 0, compose)
    return gate, gate_i, value, value_i


@triton.jit
def apply_map(gate, gate_i, value, value_i, state, state_i, COMPLEX: tl.constexpr):
    """gate state + value."""
    if COMPLEX:
        real = gate * state - gate_i * state_i + value
        imaginary = gate * state_i + gate_i * state + value_i
    else:
        real = gate * state + value
        imaginary = real
    return real, imaginary


@triton.jit
def last_row(tile, BLOCK_T: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None], tile, 0.0), 0)


@triton.jit
def turn(phase):
    """(cos, sin) of phases up to some thousand radians, to float32's rounding.

    The compiler's own take any phase, by a branch that costs a stack and a hundred instructions for each value.
    The quarter turn is subtracted in three parts, the first two short, so that their products are exact; the
    polynomials are those of the Cephes library for a remainder within an eighth of a turn.
    """
    quarter = tl.floor(phase * 0.6366197723675814 + 0.5)
    rest = phase - quarter * 1.5703125 - quarter * 4.83751296997070312e-4 - quarter * 7.54978995489188e-8
    square = rest * rest
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - 0.5 * square + 1.0
    turns = quarter.to(tl.int32)
    odd = (turns & 1) == 1
    along, across = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((turns + 1) & 2) == 2, -along, along), tl.where((turns & 2) == 2, -across, across)


@triton.jit
def load_gates(log_a_ptr, phase_ptr, offsets, mask, COMPLEX: tl.constexpr):
    """Gates; 1 outside the mask."""
    gate = tl.exp(tl.load(log_a_ptr + offsets, mask=mask, other=0.0).to(tl.float32))
    gate_i = gate
    if COMPLEX:
        phase = tl.load(phase_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        cosine, sine = turn(phase)
        gate_i = gate * sine
        gate = gate * cosine
    return gate, gate_i


@triton.jit
def load_value(pointer, offsets, mask, dim, COMPLEX: tl.constexpr):
    value = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    value_i = value
    if COMPLEX:
        value_i = tl.load(pointer + offsets + dim, mask=mask, other=0.0).to(tl.float32)
    return value, value_i


@triton.jit
def store_value(pointer, offsets, real, imaginary, mask, dim, COMPLEX: tl.constexpr):
    tl.store(pointer + offsets, real.to(pointer.dtype.element_ty), mask=mask)
    if COMPLEX:
        tl.store(pointer + offsets + dim, imaginary.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def row_times(start, length, BACKWARD: tl.constexpr, BLOCK_T: tl.constexpr):
    """Times of the tile that begins `start` rows into the walk, and which of them there are."""
    row_T = start + tl.arange(0, BLOCK_T)
    inside_T = row_T < length
    if BACKWARD:
        row_T = length - 1 - row_T
    return row_T, inside_T


@triton.jit
def load_tile(
    log_a_ptr, phase_ptr, value_ptr, edge_ptr, edge_value_ptr, time_T, inside_T, column_D, length, dim,
    BACKWARD: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Gates and values of the rows of a walk. Backwards, the gate of a row is the conjugate of the one after it.

    At the edge where a packed sequence is entered the gate is shut and the value of the edge, times the gate that
    was there, is added.
    """
    mask_TD = inside_T[:, None] & (column_D < dim)[None, :]
    value_row: tl.constexpr = 2 if COMPLEX else 1
    row_T = time_T.to(tl.int64)
    value, value_i = load_value(
        value_ptr, row_T[:, None] * (value_row * dim) + column_D[None, :], mask_TD, dim, COMPLEX
    )
    if BACKWARD:
        gate_mask_TD = mask_TD & (time_T < length - 1)[:, None]
        gate, gate_i = load_gates(
            log_a_ptr, phase_ptr, (row_T[:, None] + 1) * dim + column_D[None, :], gate_mask_TD, COMPLEX
        )
        gate_i = -gate_i
    else:
        gate, gate_i = load_gates(
            log_a_ptr, phase_ptr, row_T[:, None] * dim + column_D[None, :], mask_TD, COMPLEX
        )
    if edge_ptr is not None:
        edge_T = tl.load(edge_ptr + time_T, mask=inside_T, other=-1)
        if edge_value_ptr is not None:
            edge_offsets = edge_T.to(tl.int64)[:, None] * (value_row * dim) + column_D[None, :]
            edge_mask_TD = mask_TD & (edge_T >= 0)[:, None]
            edge, edge_i = load_value(edge_value_ptr, edge_offsets, edge_mask_TD, dim, COMPLEX)
            if BACKWARD:
                value += edge
                value_i += edge_i
            else:
                value, value_i = apply_map(gate, gate_i, value, value_i, edge, edge_i, COMPLEX)
        gate = tl.where((edge_T >= 0)[:, None], 0.0, gate)
        gate_i = tl.where((edge_T >= 0)[:, None], 0.0, gate_i)
    return gate, gate_i, value, value_i


@triton.jit
def enter_segment(
    sums_ptr, state_ptr, batch, segment, segments, column_D, dim,
    PACKED: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state before a segment: the given one, through all segments before."""
    parts: tl.constexpr = 2 if COMPLEX else 1
    state = tl.zeros([BLOCK_D], tl.float32)
    state_i = state
    if state_ptr is not None and not PACKED:
        state, state_i = load_value(state_ptr, batch * parts * dim + column_D, column_D < dim, dim, COMPLEX)
    if sums_ptr is not None:
        for first in range(0, segment, BLOCK_T):
            row_T = first + tl.arange(0, BLOCK_T)
            mask_TD = (row_T < segment)[:, None] & (column_D < dim)[None, :]
            offsets = (batch * segments + row_T)[:, None] * (2 * parts * dim) + column_D[None, :]
            gate = tl.load(sums_ptr + offsets, mask=mask_TD, other=1.0)
            gate_i = gate
            if COMPLEX:
                gate_i = tl.load(sums_ptr + offsets + dim, mask=mask_TD, other=0.0)
            value, value_i = load_value(sums_ptr, offsets + parts * dim, mask_TD, dim, COMPLEX)
            gate, gate_i, value, value_i = scan_tile(gate, gate_i, value, value_i, COMPLEX)
            value, value_i = apply_map(
                gate, gate_i, value, value_i, state[None, :], state_i[None, :], COMPLEX
            )
            state, state_i = last_row(value, BLOCK_T), last_row(value_i, BLOCK_T)
    return state, state_i


@triton.jit(do_not_specialize=["length", "rows", "segments"])
def scan_sums(
    log_a_ptr, phase_ptr, value_ptr, edge_ptr, edge_value_ptr, sums_ptr, length, rows, segments,
    dim: tl.constexpr, BACKWARD: tl.constexpr, COMPLEX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each segment's product of gates and state from zero, into sums [B, segments, 2 * parts, D]."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    parts: tl.constexpr = 2 if COMPLEX else 1
    skip = batch * length * dim
    product = tl.full([BLOCK_D], 1.0, tl.float32)
    product_i = tl.zeros([BLOCK_D], tl.float32)
    state = tl.zeros([BLOCK_D], tl.float32)
    state_i = state
    for start in range(segment * rows, tl.minimum((segment + 1) * rows, length), BLOCK_T):
        time_T, inside_T = row_times(start, length, BACKWARD, BLOCK_T)
        gate, gate_i, value, value_i = load_tile(
            log_a_ptr + skip, phase_ptr if phase_ptr is None else phase_ptr + skip, value_ptr + skip * parts,
            edge_ptr, edge_value_ptr, time_T, inside_T, column_D, length, dim, BACKWARD, COMPLEX,
        )  # fmt: skip
        gate, gate_i, value, value_i = scan_tile(gate, gate_i, value, value_i, COMPLEX)
        gate, gate_i = last_row(gate, BLOCK_T), last_row(gate_i, BLOCK_T)
        value, value_i = last_row(value, BLOCK_T), last_row(value_i, BLOCK_T)
        state, state_i = apply_map(gate, gate_i, value, value_i, state, state_i, COMPLEX)
        product, product_i = apply_map(gate, gate_i, 0.0, 0.0, product, product_i, COMPLEX)
    offsets = (batch * segments + segment) * (2 * parts * dim) + column_D
    store_value(sums_ptr, offsets, product, product_i, column_D < dim, dim, COMPLEX)
    store_value(sums_ptr, offsets + parts * dim, state, state_i, column_D < dim, dim, COMPLEX)


@triton.jit(do_not_specialize=["length", "rows", "segments"])
def scan_forward(
    log_a_ptr, phase_ptr, b_ptr, state_ptr, first_ptr, last_ptr, sums_ptr, h_ptr, final_ptr,
    length, rows, segments, dim: tl.constexpr, COMPLEX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h of the rows of one segment, and the states behind the last rows."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    parts: tl.constexpr = 2 if COMPLEX else 1
    packed: tl.constexpr = first_ptr is not None
    skip = batch * length * dim
    state, state_i = enter_segment(
        sums_ptr, state_ptr, batch, segment, segments, column_D, dim, packed, COMPLEX, BLOCK_T, BLOCK_D
    )
    for start in range(segment * rows, tl.minimum((segment + 1) * rows, length), BLOCK_T):
        time_T, inside_T = row_times(start, length, False, BLOCK_T)
        gate, gate_i, value, value_i = load_tile(
            log_a_ptr + skip, phase_ptr if phase_ptr is None else phase_ptr + skip, b_ptr + skip * parts,
            first_ptr, state_ptr, time_T, inside_T, column_D, length, dim, False, COMPLEX,
        )  # fmt: skip
        gate, gate_i, value, value_i = scan_tile(gate, gate_i, value, value_i, COMPLEX)
        value, value_i = apply_map(gate, gate_i, value, value_i, state[None, :], state_i[None, :], COMPLEX)
        mask_TD = inside_T[:, None] & (column_D < dim)[None, :]
        offsets = time_T.to(tl.int64)[:, None] * (parts * dim) + column_D[None, :]
        store_value(h_ptr + skip * parts, offsets, value, value_i, mask_TD, dim, COMPLEX)
        if packed:
            last_T = tl.load(last_ptr + time_T, mask=inside_T, other=-1)
            last_offsets = last_T.to(tl.int64)[:, None] * (parts * dim) + column_D[None, :]
            store_value(
                final_ptr, last_offsets, value, value_i, mask_TD & (last_T >= 0)[:, None], dim, COMPLEX
            )
        state, state_i = last_row(value, BLOCK_T), last_row(value_i, BLOCK_T)
    if not packed:
        store_value(
            final_ptr, batch * parts * dim + column_D, state, state_i,
            (column_D < dim) & (segment == segments - 1), dim, COMPLEX,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "rows", "segments"])
def scan_backward(
    log_a_ptr, phase_ptr, h_ptr, state_ptr, dh_ptr, dfinal_ptr, first_ptr, last_ptr, sums_ptr,
    dlog_a_ptr, dphase_ptr, db_ptr, dstate_ptr, length, rows, segments,
    dim: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of one segment, counted from the last row, and of the states before the first rows."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    parts: tl.constexpr = 2 if COMPLEX else 1
    packed: tl.constexpr = first_ptr is not None
    skip = batch * length * dim
    phase_ptr = phase_ptr if phase_ptr is None else phase_ptr + skip
    state, state_i = enter_segment(
        sums_ptr, dfinal_ptr, batch, segment, segments, column_D, dim, packed, COMPLEX, BLOCK_T, BLOCK_D
    )
    for start in range(segment * rows, tl.minimum((segment + 1) * rows, length), BLOCK_T):
        time_T, inside_T = row_times(start, length, True, BLOCK_T)
        gate, gate_i, value, value_i = load_tile(
            log_a_ptr + skip, phase_ptr, dh_ptr + skip * parts,
            last_ptr, dfinal_ptr, time_T, inside_T, column_D, length, dim, True, COMPLEX,
        )  # fmt: skip
        gate, gate_i, value, value_i = scan_tile(gate, gate_i, value, value_i, COMPLEX)
        value, value_i = apply_map(gate, gate_i, value, value_i, state[None, :], state_i[None, :], COMPLEX)
        state, state_i = last_row(value, BLOCK_T), last_row(value_i, BLOCK_T)
        mask_TD = inside_T[:, None] & (column_D < dim)[None, :]
        row_T = time_T.to(tl.int64)
        offsets = row_T[:, None] * (parts * dim) + column_D[None, :]
        store_value(db_ptr + skip * parts, offsets, value, value_i, mask_TD, dim, COMPLEX)
        # What the state before the row receives: conj(a_t) dh_t.
        gate_offsets = row_T[:, None] * dim + column_D[None, :]
        gate, gate_i = load_gates(log_a_ptr + skip, phase_ptr, gate_offsets, mask_TD, COMPLEX)
        value, value_i = apply_map(gate, -gate_i, 0.0, 0.0, value, value_i, COMPLEX)
        if packed:
            first_T = tl.load(first_ptr + time_T, mask=inside_T, other=-1)
        else:
            first_T = tl.where(inside_T & (time_T == 0), batch, -1)
        first_mask_TD = mask_TD & (first_T >= 0)[:, None]
        first_offsets = first_T.to(tl.int64)[:, None] * (parts * dim) + column_D[None, :]
        store_value(dstate_ptr, first_offsets, value, value_i, first_mask_TD, dim, COMPLEX)
        past_mask_TD = mask_TD & (first_T < 0)[:, None]
        past, past_i = load_value(h_ptr + skip * parts, offsets - parts * dim, past_mask_TD, dim, COMPLEX)
        if state_ptr is not None:
            given, given_i = load_value(state_ptr, first_offsets, first_mask_TD, dim, COMPLEX)
            past += given
            past_i += given_i
        dlog_a = past * value
        if COMPLEX:
            dlog_a += past_i * value_i
            dphase = past * value_i - past_i * value
            tl.store(dphase_ptr + skip + gate_offsets, dphase.to(dphase_ptr.dtype.element_ty), mask=mask_TD)
        tl.store(dlog_a_ptr + skip + gate_offsets, dlog_a.to(dlog_a_ptr.dtype.element_ty), mask=mask_TD)


@triton.jit
def scan_step(
    log_a_ptr, phase_ptr, b_ptr, state_ptr, h_ptr, dim: tl.constexpr, COMPLEX: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token, the state in place."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = tl.program_id(1).to(tl.int64)
    parts: tl.constexpr = 2 if COMPLEX else 1
    offsets = batch * (parts * dim) + column_D
    mask_D = column_D < dim
    gate, gate_i = load_gates(log_a_ptr, phase_ptr, batch * dim + column_D, mask_D, COMPLEX)
    value, value_i = load_value(b_ptr, offsets, mask_D, dim, COMPLEX)
    state, state_i = load_value(state_ptr, offsets, mask_D, dim, COMPLEX)
    state, state_i = apply_map(gate, gate_i, value, value_i, state, state_i, COMPLEX)
    store_value(state_ptr, offsets, state, state_i, mask_D, dim, COMPLEX)
    store_value(h_ptr, offsets, state, state_i, mask_D, dim, COMPLEX)


def cut_time(length: int, programs: int, block: int) -> tuple[int, int]:
    """(segments, rows of each, a multiple of `block`) where one segment gives `programs` programs.

    Two segments would read everything twice for twice the programs, so that the least number above one is three.
    """
    tiles = -(-length // block)
    wanted = min(PROGRAMS // programs, tiles)
    if wanted < 3:
        return 1, tiles * block
    rows = -(-tiles // wanted)
    return -(-tiles // rows), rows * block


def plan_scan(kernel: str, b: Tensor) -> tuple[Config, tuple[int, int, int], int]:
    """The blocks of a kernel, its grid (channels, segments, batch) and the rows of a segment.

    In the table, the value dim is the number of a value's parts, real and imaginary.
    """
    batch, length, dim = b.shape[0], b.shape[1], b.shape[-1]
    config = choose(kernel, generation(), b.dtype, key=dim, value=b.dim() - 2)
    columns = -(-dim // config.blocks["BLOCK_D"])
    segments, rows = cut_time(length, batch * columns, config.blocks["BLOCK_T"])
    return config, (columns, segments, batch), rows


def run_forward(
    log_a: Tensor, phase: Tensor | None, b: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    # Here, for what stands in front of a registered operation is traced by torch.compile.
    check_device(b=b, log_a=log_a, phase=phase, state=state, cu_seqlens=cu_seqlens)
    h, final = empty_forward(log_a, phase, b, state, cu_seqlens)
    length, dim = b.shape[1], b.shape[-1]
    first, last = (None, None) if cu_seqlens is None else sequence_edges(cu_seqlens, length)
    config, grid, rows = plan_scan("scan_forward", b)
    shape: dict[str, Any] = {"dim": dim, "COMPLEX": phase is not None}
    sums = None
    if grid[1] > 1:
        parts = 1 if phase is None else 2
        sums = b.new_empty(b.shape[0], grid[1], 2 * parts, dim, dtype=torch.float32)
        launch(
            scan_sums, grid, log_a, phase, b, first, state, sums, length, rows, grid[1],
            BACKWARD=False, config=config, **shape,
        )  # fmt: skip
    launch(
        scan_forward, grid, log_a, phase, b, state, first, last, sums, h, final, length, rows, grid[1],
        config=config, **shape,
    )  # fmt: skip
    return h, final


def empty_forward(
    log_a: Tensor, phase: Tensor | None, b: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h and the final states, not yet written."""
    sequences = b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(b), b.new_empty(sequences, *b.shape[2:], dtype=torch.float32)


def run_backward(
    log_a: Tensor,
    phase: Tensor | None,
    h: Tensor,
    state: Tensor | None,
    dh: Tensor,
    dfinal: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dlog_a, dphase, db, dstate = empty_backward(log_a, phase, h, state, dh, dfinal, cu_seqlens)
    length, dim = h.shape[1], h.shape[-1]
    first, last = (None, None) if cu_seqlens is None else sequence_edges(cu_seqlens, length)
    config, grid, rows = plan_scan("scan_backward", h)
    shape: dict[str, Any] = {"dim": dim, "COMPLEX": phase is not None}
    sums = None
    if grid[1] > 1:
        parts = 1 if phase is None else 2
        sums = h.new_empty(h.shape[0], grid[1], 2 * parts, dim, dtype=torch.float32)
        launch(
            scan_sums, grid, log_a, phase, dh, last, dfinal, sums, length, rows, grid[1],
            BACKWARD=True, config=config, **shape,
        )  # fmt: skip
    launch(
        scan_backward, grid, log_a, phase, h, state, dh, dfinal, first, last, sums,
        dlog_a, None if phase is None else dphase, db, dstate, length, rows, grid[1], config=config, **shape,
    )  # fmt: skip
    return dlog_a, dphase, db, dstate


def empty_backward(
    log_a: Tensor,
    phase: Tensor | None,
    h: Tensor,
    state: Tensor | None,
    dh: Tensor,
    dfinal: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log a, phase (empty where there is none), b and the state, not yet written."""
    dphase = log_a.new_empty(0) if phase is None else torch.empty_like(phase)
    return torch.empty_like(log_a), dphase, torch.empty_like(h), torch.empty_like(dfinal)


_forward = torch.library.custom_op("mixforge::gated_scan_forward", on_device(run_forward), mutates_args=())
_backward = torch.library.custom_op("mixforge::gated_scan_backward", on_device(run_backward), mutates_args=())


@_forward.register_fake
def _(
    log_a: Tensor, phase: Tensor | None, b: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    # Tensors of the meta device get this far only where launches are written down.
    made = run_forward if b.device.type == "meta" else empty_forward
    return made(log_a, phase, b, state, cu_seqlens)


@_backward.register_fake
def _(
    log_a: Tensor,
    phase: Tensor | None,
    h: Tensor,
    state: Tensor | None,
    dh: Tensor,
    dfinal: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = run_backward if h.device.type == "meta" else empty_backward
    return made(log_a, phase, h, state, dh, dfinal, cu_seqlens)


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    log_a, phase, _, state, cu_seqlens = inputs
    ctx.save_for_backward(log_a, phase, output[0], state, cu_seqlens)


def _differentiate(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    log_a, phase, h, state, cu_seqlens = ctx.saved_tensors
    dlog_a, dphase, db, dstate = _backward(
        log_a, phase, h, state, dh.contiguous(), dfinal.contiguous(), cu_seqlens
    )
    return dlog_a, None if phase is None else dphase, db, None if state is None else dstate, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def gated_scan_triton(
    log_a_BTD: Tensor, b_BTD: Tensor, state_BD: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `gated_scan_reference`, on a GPU."""
    check_scan(log_a_BTD, b_BTD, state_BD, cu_seqlens)
    check_dtypes(b=b_BTD, log_a=log_a_BTD)
    state = None if state_BD is None else state_BD.float().contiguous()
    h, final = _forward(log_a_BTD.contiguous(), None, b_BTD.contiguous(), state, cu_seqlens)
    return h, final


def gated_scan_complex_triton(
    log_a_BTD: Tensor,
    phase_BTD: Tensor,
    b_BTPD: Tensor,
    state_BPD: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `gated_scan_complex_reference`, on a GPU."""
    check_complex(log_a_BTD, phase_BTD, b_BTPD, state_BPD, cu_seqlens)
    check_dtypes(b=b_BTPD, log_a=log_a_BTD, phase=phase_BTD)
    state = None if state_BPD is None else state_BPD.float().contiguous()
    h, final = _forward(
        log_a_BTD.contiguous(), phase_BTD.contiguous(), b_BTPD.contiguous(), state, cu_seqlens
    )
    return h, final


def gated_scan_step_triton(log_a_BD: Tensor, b_BD: Tensor, state_BD: Tensor) -> tuple[Tensor, Tensor]:
    """One token: (h_BD in the dtype of b, state_BD), the float32 state in place. It has no gradient."""
    return _step(log_a_BD, None, b_BD, state_BD)


def gated_scan_complex_step_triton(
    log_a_BD: Tensor, phase_BD: Tensor, b_BPD: Tensor, state_BPD: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (h_BPD in the dtype of b, state_BPD), the float32 state in place. It has no gradient."""
    return _step(log_a_BD, phase_BD, b_BPD, state_BPD)


def _step(log_a: Tensor, phase: Tensor | None, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    check_dtypes(b=b, log_a=log_a)
    check_state(state, b.shape)
    phase = None if phase is None else phase.contiguous()
    return _step_op(log_a.contiguous(), phase, b.contiguous(), state), state


def run_step(log_a: Tensor, phase: Tensor | None, b: Tensor, state: Tensor) -> Tensor:
    check_device(b=b, log_a=log_a, phase=phase, state=state)
    h = torch.empty_like(b)
    config = choose("scan_step", generation(), b.dtype, key=b.shape[-1])
    grid = (-(-b.shape[-1] // config.blocks["BLOCK_D"]), b.shape[0])
    constants: dict[str, Any] = {"dim": b.shape[-1], "COMPLEX": phase is not None}
    launch(scan_step, grid, log_a, phase, b, state, h, config=config, **constants)
    return h


_step_op = torch.library.custom_op("mixforge::gated_scan_step", on_device(run_step), mutates_args=("state",))


@_step_op.register_fake
def _(log_a: Tensor, phase: Tensor | None, b: Tensor, state: Tensor) -> Tensor:
    return run_step(log_a, phase, b, state) if b.device.type == "meta" else torch.empty_like(b)


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor is of no dtype that the kernels take."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} is {tensor.dtype}; backend='triton' takes float32, bfloat16 and float16"
            )


def check_state(state: Tensor, shape: torch.Size) -> None:
    """Raise ValueError where a state cannot be updated in place."""
    if state.shape != shape or state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(
            f"state must be float32, contiguous and of shape {list(shape)}, "
            f"got {state.dtype} of shape {list(state.shape)} and strides {list(state.stride())}"
        )
