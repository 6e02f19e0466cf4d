"""Triton form of the elementwise scans: `gated_scan` with real gates, `gated_scan_complex` with complex ones.

A program takes BLOCK_D channels through time, token by token; of an associative scan over rows most would be exchanges
between lanes. What it waits for is memory: all rows of a tile of BLOCK_T tokens are asked for at once, into registers,
before the tile in front of them is stored, so that a few warps of a multiprocessor keep enough on its way. Where batch
and channels make too few programs, the time is cut into segments: one launch sums up each segment by its product of
gates and its state from zero, and a second goes through the sums of the segments before its own and then its rows.
Only products of gates occur. The backward pass is the same walk from the last row to the first:

    dh_t = dy_t + p_{t+1}        p_t = conj(a_t) dh_t        d log a_t = Re(conj(p_t) h_{t-1})

where h_{t-1} is what forward returned.

Source: Blelloch 1990 (Prefix sums and their applications, section 1.4) for first-order recurrences in blocks.
"""

# Kernels are written in the language of Triton, whose values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.blocks import Config, choose
from mixforge.kernels.gated_scan import check_scan
from mixforge.kernels.gated_scan_complex import check_complex
from mixforge.kernels.launch import check_dtypes, check_runs, check_state, generation, launch, on_device
from mixforge.kernels.operands import wants_gradient
from mixforge.kernels.packed import sequence_edges, write_untouched

# Programs that keep a large device busy; fewer are made more by cutting the time, which reads the inputs twice.
PROGRAMS = 512


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
def form_gate(log_a, phase, COMPLEX: tl.constexpr):
    """The gate, of its parts as they are in memory."""
    gate = tl.exp2(log_a.to(tl.float32) * 1.4426950408889634)
    gate_i = gate
    if COMPLEX:
        cosine, sine = turn(phase.to(tl.float32))
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
def load_rows(pointer, offsets, left, step: tl.constexpr, other: tl.constexpr, BLOCK_T: tl.constexpr):
    """Rows as they are in memory, each `step` numbers behind the one before; none where there is no pointer.

    Where `offsets` are None, no row is there.
    """
    rows = ()
    if pointer is not None:
        for row in tl.static_range(BLOCK_T):
            if offsets is None:
                rows += (tl.full(left.shape, other, pointer.dtype.element_ty),)
            else:
                rows += (tl.load(pointer + offsets + row * step, mask=row < left, other=other),)
    return rows


@triton.jit
def load_tile(
    log_a_ptr, phase_ptr, value_ptr, past_ptr, enter_ptr, leave_ptr, batch, start, end, length, column_D,
    dim: tl.constexpr, BACKWARD: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What a walk reads of its rows from `start`, those before `end`: all is asked for before any is used.

    Where `start` is None, no row is there.
    """
    step: tl.constexpr = -1 if BACKWARD else 1
    wide: tl.constexpr = 2 * dim if COMPLEX else dim
    left = end
    row, gates, values, values_i = None, None, None, None
    if start is not None:
        left = end - start
        row = batch * length + (length - 1 - start if BACKWARD else start)
        gates, values = row * dim + column_D, row * wide + column_D
        values_i = values + dim
    left_D = tl.where(column_D < dim, left, 0)
    log_a = load_rows(log_a_ptr, gates, left_D, step * dim, 0.0, BLOCK_T)
    phase = load_rows(phase_ptr, gates, left_D, step * dim, 0.0, BLOCK_T)
    value = load_rows(value_ptr, values, left_D, step * wide, 0.0, BLOCK_T)
    value_i = load_rows(value_ptr if COMPLEX else None, values_i, left_D, step * wide, 0.0, BLOCK_T)
    if past_ptr is not None and start is not None:
        # The h of the row before, which the first row of all does not have.
        left_D = tl.where(column_D < dim, tl.minimum(end, length - 1) - start, 0)
        values, values_i = values - wide, values_i - wide
    past = load_rows(past_ptr, values, left_D, step * wide, 0.0, BLOCK_T)
    past_i = load_rows(past_ptr if COMPLEX else None, values_i, left_D, step * wide, 0.0, BLOCK_T)
    enter = load_rows(enter_ptr, row, left, step, -1, BLOCK_T)
    leave = load_rows(leave_ptr, row, left, step, -1, BLOCK_T)
    return log_a, phase, value, value_i, past, past_i, enter, leave


@triton.jit
def form_tile(tile, BACKWARD: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_T: tl.constexpr):
    """Gates (backwards, their conjugates), values and pasts of the rows in float32, and edges."""
    log_a, phase, value, value_i, past, past_i, enter, leave = tile
    rows = ()
    for row in tl.static_range(BLOCK_T):
        gate, gate_i = form_gate(log_a[row], phase[row] if COMPLEX else 0.0, COMPLEX)
        here = value[row].to(tl.float32)
        here_i = value_i[row].to(tl.float32) if COMPLEX else here
        rows += ((gate, -gate_i if BACKWARD else gate_i, here, here_i),)
    pasts = ()
    for row in tl.static_range(len(past)):
        before = past[row].to(tl.float32)
        pasts += ((before, past_i[row].to(tl.float32) if COMPLEX else before),)
    return rows, pasts, enter, leave


@triton.jit
def at_edge(edge, given_ptr, state, state_i, column_D, dim: tl.constexpr, COMPLEX: tl.constexpr):
    """At an edge of packed sequences what is given there, or nothing; elsewhere the state."""
    wide: tl.constexpr = 2 * dim if COMPLEX else dim
    given = tl.zeros_like(state)
    given_i = given
    if given_ptr is not None:
        mask_D = (edge >= 0) & (column_D < dim)
        given, given_i = load_value(given_ptr, edge.to(tl.int64) * wide + column_D, mask_D, dim, COMPLEX)
    return tl.where(edge >= 0, given, state), tl.where(edge >= 0, given_i, state_i)


@triton.jit
def enter_segment(
    sums_ptr, state_ptr, batch, segment, segments, column_D,
    dim: tl.constexpr, PACKED: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state before a segment: the given one, through all segments before."""
    wide: tl.constexpr = 2 * dim if COMPLEX else dim
    state = tl.zeros([BLOCK_D], tl.float32)
    state_i = state
    if state_ptr is not None and not PACKED:
        state, state_i = load_value(state_ptr, batch * wide + column_D, column_D < dim, dim, COMPLEX)
    if sums_ptr is not None:
        for first in range(0, segment, BLOCK_T):
            left_D = tl.where(column_D < dim, segment - first, 0)
            here = (batch * segments + first) * (2 * wide) + column_D
            gate = load_rows(sums_ptr, here, left_D, 2 * wide, 1.0, BLOCK_T)
            gate_i = gate
            value = load_rows(sums_ptr, here + wide, left_D, 2 * wide, 0.0, BLOCK_T)
            value_i = value
            if COMPLEX:
                gate_i = load_rows(sums_ptr, here + dim, left_D, 2 * wide, 0.0, BLOCK_T)
                value_i = load_rows(sums_ptr, here + wide + dim, left_D, 2 * wide, 0.0, BLOCK_T)
            for row in tl.static_range(BLOCK_T):
                state, state_i = apply_map(
                    gate[row], gate_i[row], value[row], value_i[row], state, state_i, COMPLEX
                )
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
    wide: tl.constexpr = 2 * dim if COMPLEX else dim
    first, end = segment * rows, tl.minimum((segment + 1) * rows, length)
    product = tl.full([BLOCK_D], 1.0, tl.float32)
    product_i = tl.zeros([BLOCK_D], tl.float32)
    state = tl.zeros([BLOCK_D], tl.float32)
    state_i = state
    tile = load_tile(
        log_a_ptr, phase_ptr, value_ptr, None, edge_ptr, None, batch, None, end, length, column_D,
        dim, BACKWARD, COMPLEX, BLOCK_T,
    )  # fmt: skip
    # The first turn only loads: a tile to begin with would be compiled once more.
    for start in range(first - BLOCK_T, end, BLOCK_T):
        formed, _, edges, _ = form_tile(tile, BACKWARD, COMPLEX, BLOCK_T)
        tile = load_tile(
            log_a_ptr, phase_ptr, value_ptr, None, edge_ptr, None, batch, start + BLOCK_T, end, length, column_D,
            dim, BACKWARD, COMPLEX, BLOCK_T,
        )  # fmt: skip
        for row in tl.static_range(BLOCK_T):
            gate, gate_i, value, value_i = formed[row]
            if edge_ptr is not None:
                state, state_i = at_edge(edges[row], edge_value_ptr, state, state_i, column_D, dim, COMPLEX)
                product = tl.where(edges[row] >= 0, 0.0, product)
                product_i = tl.where(edges[row] >= 0, 0.0, product_i)
            if BACKWARD:
                state, state_i = apply_map(gate, gate_i, 0.0, 0.0, state + value, state_i + value_i, COMPLEX)
            else:
                state, state_i = apply_map(gate, gate_i, value, value_i, state, state_i, COMPLEX)
            product, product_i = apply_map(gate, gate_i, 0.0, 0.0, product, product_i, COMPLEX)
    offsets = (batch * segments + segment) * (2 * wide) + column_D
    store_value(sums_ptr, offsets, product, product_i, column_D < dim, dim, COMPLEX)
    store_value(sums_ptr, offsets + wide, state, state_i, column_D < dim, dim, COMPLEX)


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
    wide: tl.constexpr = 2 * dim if COMPLEX else dim
    packed: tl.constexpr = first_ptr is not None
    first, end = segment * rows, tl.minimum((segment + 1) * rows, length)
    state, state_i = enter_segment(
        sums_ptr, state_ptr, batch, segment, segments, column_D, dim, packed, COMPLEX, BLOCK_T, BLOCK_D
    )
    tile = load_tile(
        log_a_ptr, phase_ptr, b_ptr, None, first_ptr, last_ptr, batch, None, end, length, column_D,
        dim, False, COMPLEX, BLOCK_T,
    )  # fmt: skip
    # The first turn only loads: a tile to begin with would be compiled once more.
    for start in range(first - BLOCK_T, end, BLOCK_T):
        formed, _, firsts, lasts = form_tile(tile, False, COMPLEX, BLOCK_T)
        tile = load_tile(
            log_a_ptr, phase_ptr, b_ptr, None, first_ptr, last_ptr, batch, start + BLOCK_T, end, length, column_D,
            dim, False, COMPLEX, BLOCK_T,
        )  # fmt: skip
        left_D = tl.where((column_D < dim) & (start >= first), end - start, 0)
        here_ptr = h_ptr + (batch * length + start) * wide + column_D
        for row in tl.static_range(BLOCK_T):
            gate, gate_i, value, value_i = formed[row]
            if packed:
                state, state_i = at_edge(firsts[row], state_ptr, state, state_i, column_D, dim, COMPLEX)
            state, state_i = apply_map(gate, gate_i, value, value_i, state, state_i, COMPLEX)
            store_value(here_ptr, row * wide, state, state_i, row < left_D, dim, COMPLEX)
            if packed:
                offsets = lasts[row].to(tl.int64) * wide + column_D
                mask_D = (lasts[row] >= 0) & (column_D < dim)
                store_value(final_ptr, offsets, state, state_i, mask_D, dim, COMPLEX)
    if not packed:
        mask_D = (column_D < dim) & (segment == segments - 1)
        store_value(final_ptr, batch * wide + column_D, state, state_i, mask_D, dim, COMPLEX)


@triton.jit
def store_gate_gradients(
    dlog_a_ptr, dphase_ptr, offsets, further: tl.constexpr, past, past_i, passed, passed_i, mask, COMPLEX: tl.constexpr
):  # fmt: skip
    """The gradients of a row's log gate and phase, of the h before it and conj(a_t) dh_t."""
    dlog_a = past * passed
    if COMPLEX:
        dlog_a += past_i * passed_i
        dphase = past * passed_i - past_i * passed
        tl.store(dphase_ptr + offsets + further, dphase.to(dphase_ptr.dtype.element_ty), mask=mask)
    tl.store(dlog_a_ptr + offsets + further, dlog_a.to(dlog_a_ptr.dtype.element_ty), mask=mask)


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
    wide: tl.constexpr = 2 * dim if COMPLEX else dim
    packed: tl.constexpr = first_ptr is not None
    first, end = segment * rows, tl.minimum((segment + 1) * rows, length)
    # conj(a_t) dh_t: what a row gives to the state before it.
    passed, passed_i = enter_segment(
        sums_ptr, dfinal_ptr, batch, segment, segments, column_D, dim, packed, COMPLEX, BLOCK_T, BLOCK_D
    )
    tile = load_tile(
        log_a_ptr, phase_ptr, dh_ptr, h_ptr, last_ptr, first_ptr, batch, None, end, length, column_D,
        dim, True, COMPLEX, BLOCK_T,
    )  # fmt: skip
    # The first turn only loads: a tile to begin with would be compiled once more.
    for start in range(first - BLOCK_T, end, BLOCK_T):
        formed, pasts, lasts, firsts = form_tile(tile, True, COMPLEX, BLOCK_T)
        tile = load_tile(
            log_a_ptr, phase_ptr, dh_ptr, h_ptr, last_ptr, first_ptr, batch, start + BLOCK_T, end, length, column_D,
            dim, True, COMPLEX, BLOCK_T,
        )  # fmt: skip
        left_D = tl.where((column_D < dim) & (start >= first), end - start, 0)
        time = batch * length + length - 1 - start
        for row in tl.static_range(BLOCK_T):
            gate, gate_i, value, value_i = formed[row]
            past, past_i = pasts[row]
            if packed:
                passed, passed_i = at_edge(lasts[row], dfinal_ptr, passed, passed_i, column_D, dim, COMPLEX)
            value, value_i = value + passed, value_i + passed_i
            store_value(
                db_ptr + time * wide + column_D, -row * wide, value, value_i, row < left_D, dim, COMPLEX
            )
            passed, passed_i = apply_map(gate, gate_i, 0.0, 0.0, value, value_i, COMPLEX)
            if packed:
                offsets = firsts[row].to(tl.int64) * wide + column_D
                mask_D = (firsts[row] >= 0) & (column_D < dim)
                store_value(dstate_ptr, offsets, passed, passed_i, mask_D, dim, COMPLEX)
                past, past_i = at_edge(firsts[row], state_ptr, past, past_i, column_D, dim, COMPLEX)
            store_gate_gradients(
                dlog_a_ptr, dphase_ptr, time * dim + column_D, -row * dim, past, past_i, passed, passed_i,
                row < left_D, COMPLEX,
            )  # fmt: skip
    if not packed:
        mask_D = (column_D < dim) & (segment == segments - 1)
        store_value(dstate_ptr, batch * wide + column_D, passed, passed_i, mask_D, dim, COMPLEX)
        if state_ptr is not None:
            # The past of the first row is the given state. The walk has taken it for zero.
            past, past_i = load_value(state_ptr, batch * wide + column_D, mask_D, dim, COMPLEX)
            offsets = batch * length * dim + column_D
            store_gate_gradients(
                dlog_a_ptr, dphase_ptr, offsets, 0, past, past_i, passed, passed_i, mask_D, COMPLEX
            )


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
    log_a = tl.load(log_a_ptr + batch * dim + column_D, mask=mask_D, other=0.0)
    phase = log_a
    if COMPLEX:
        phase = tl.load(phase_ptr + batch * dim + column_D, mask=mask_D, other=0.0)
    gate, gate_i = form_gate(log_a, phase, COMPLEX)
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


def plan_scan(kernel: str, b: Tensor, is_packed: bool) -> tuple[Config, tuple[int, int, int], int]:
    """The blocks of a kernel, its grid (channels, segments, batch) and the rows of a segment.

    In the table, the value dim is the number of a value's parts, real and imaginary.
    """
    batch, length, dim = b.shape[0], b.shape[1], b.shape[-1]
    config = choose(
        kernel, generation(), b.dtype, key=dim, value=b.dim() - 2, variant="packed" if is_packed else ""
    )
    columns = -(-dim // config.blocks["BLOCK_D"])
    segments, rows = cut_time(length, batch * columns, config.blocks["BLOCK_T"])
    return config, (columns, segments, batch), rows


def run_forward(
    log_a: Tensor, phase: Tensor | None, b: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    h, final = empty_forward(log_a, phase, b, state, cu_seqlens)
    if cu_seqlens is not None:
        write_untouched(final, state)
    length, dim = b.shape[1], b.shape[-1]
    first, last = (None, None) if cu_seqlens is None else sequence_edges(cu_seqlens, length)
    config, grid, rows = plan_scan("scan_forward", b, cu_seqlens is not None)
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
    if cu_seqlens is not None:
        write_untouched(dstate, dfinal)
    length, dim = h.shape[1], h.shape[-1]
    first, last = (None, None) if cu_seqlens is None else sequence_edges(cu_seqlens, length)
    config, grid, rows = plan_scan("scan_backward", h, cu_seqlens is not None)
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
    check_runs("b", b_BTD)
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
    check_runs("b", b_BTPD)
    check_dtypes(b=b_BTPD, log_a=log_a_BTD, phase=phase_BTD)
    state = None if state_BPD is None else state_BPD.float().contiguous()
    h, final = _forward(
        log_a_BTD.contiguous(), phase_BTD.contiguous(), b_BTPD.contiguous(), state, cu_seqlens
    )
    return h, final


def gated_scan_step_triton(log_a_BD: Tensor, b_BD: Tensor, state_BD: Tensor) -> tuple[Tensor, Tensor]:
    """One token: (h_BD in the dtype of b, state_BD), the float32 state in place.

    Where gradients are wanted, it is a sequence of one token, which has them. Raises ValueError where a shape, dtype or
    device does not fit.
    """
    check_scan(log_a_BD, b_BD, state_BD, is_step=True)
    if wants_gradient(log_a_BD, b_BD, state_BD):
        h_BTD, after_BD = gated_scan_triton(log_a_BD[:, None], b_BD[:, None], state_BD)
        return h_BTD[:, 0], after_BD
    return _step(log_a_BD, None, b_BD, state_BD)


def gated_scan_complex_step_triton(
    log_a_BD: Tensor, phase_BD: Tensor, b_BPD: Tensor, state_BPD: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (h_BPD in the dtype of b, state_BPD), the float32 state in place.

    Where gradients are wanted, it is a sequence of one token, which has them. Raises ValueError where a shape, dtype or
    device does not fit.
    """
    check_complex(log_a_BD, phase_BD, b_BPD, state_BPD, is_step=True)
    if wants_gradient(log_a_BD, phase_BD, b_BPD, state_BPD):
        h_BTPD, after_BPD = gated_scan_complex_triton(
            log_a_BD[:, None], phase_BD[:, None], b_BPD[:, None], state_BPD
        )
        return h_BTPD[:, 0], after_BPD
    return _step(log_a_BD, phase_BD, b_BPD, state_BPD)


def _step(log_a: Tensor, phase: Tensor | None, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    check_runs("b", b)
    check_dtypes(b=b, log_a=log_a, phase=phase)
    check_state(state, b.shape)
    phase = None if phase is None else phase.contiguous()
    return _step_op(log_a.contiguous(), phase, b.contiguous(), state), state


def run_step(log_a: Tensor, phase: Tensor | None, b: Tensor, state: Tensor) -> Tensor:
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
