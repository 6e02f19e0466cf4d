"""Triton form of Mamba's selective scan: `selective_scan` has the equations.

A program takes BLOCK_D channels with all of their N states through time, token by token; nothing of size [B, T, D, N]
reaches memory. Where there are too few programs, the time is cut into segments as in `gated_scan_triton`; the product of
a segment's gates is exp(A sum dt). For the backward pass the state before each tile of BLOCK_T tokens is kept. It forms
the states of a tile anew, which stay in registers, and walks them from the last, with h_{t-1} as it was and never by a
difference; with dh_t = C_t dy_t + a_{t+1} dh_{t+1}:

    d x_t = dt_t sum_n dh_t B_t + skip dy_t            d B_t = sum_d dh_t dt_t x_t
    d dt_t = sum_n dh_t (A a_t h_{t-1} + B_t x_t)      d C_t = sum_d h_t dy_t
    d A = sum_t dh_t dt_t a_t h_{t-1}                  d skip = sum_t dy_t x_t

Sums over lanes are what takes the time. A program's states are [C, D, N] for that, its channels on two axes: of a thread
of a warp, whose lanes share D and all but four of the states, are all of C, and these are summed first.

Sums over programs are added up afterwards in a fixed order.

Source: Gu and Dao 2023 (arXiv 2312.00752, section 3.3.2 and appendix D), which recomputes states in backward.
"""

# Kernels are written in the language of Triton, whose values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.backend import BeyondKernels
from mixforge.kernels.blocks import Config, choose
from mixforge.kernels.gated_scan_triton import cut_time
from mixforge.kernels.launch import check_dtypes, check_runs, check_state, generation, launch, on_device
from mixforge.kernels.operands import wants_gradient
from mixforge.kernels.selective_scan import check_selective

# States of one channel: a tile holds all of them.
LARGEST_STATE = 64
LOG_2 = tl.constexpr(math.log(2.0))


@triton.jit
def channels_and_states(WIDE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The numbers of a program's channels [C, D, 1], and of their states [1, 1, N]."""
    # Loads of four float32 at once give a thread four states; D is what fills a warp beside them.
    LANES: tl.constexpr = min(BLOCK_D, 32 if WIDE < 4 else 128 // WIDE)
    first = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D // LANES)[:, None, None] * LANES
    return first + tl.arange(0, LANES)[None, :, None], tl.arange(0, WIDE)[None, None, :]


@triton.jit
def load_rows(tile_ptr, first, rows: tl.constexpr, length, column, size: tl.constexpr):
    """Columns of a tile's rows, from row `first` of a [T, size] matrix on: each by itself, as stored; zeros outside.

    A walk loads all that it needs of a tile before it stores anything: no load is moved in front of a store.
    """
    mask = column < size
    found = (tl.load(tile_ptr + column, mask=mask & (first < length), other=0.0),)
    for step in tl.static_range(1, rows):
        inside = mask & (first + step < length)
        found += (tl.load(tile_ptr + (step * size + column), mask=inside, other=0.0),)
    return found


@triton.jit
def store_row(tile_ptr, value, step: tl.constexpr, row, length, column, size: tl.constexpr):
    """As `load_row`, in the dtype of what is pointed to."""
    mask = (row < length) & (column < size)
    tl.store(tile_ptr + (step * size + column), value.to(tile_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_rates(rate_ptr, place, inside):
    """The rates over log 2, of which powers of two are taken."""
    return tl.load(rate_ptr + place, mask=inside, other=0.0).to(tl.float32) * (1.0 / LOG_2)


@triton.jit
def over_channels(value_CDN):
    """Sums [1, 1, N], over what a thread has first."""
    return tl.sum(tl.sum(value_CDN, 0, keep_dims=True), 1, keep_dims=True)


@triton.jit
def enter_segment(
    steps_ptr, sums_ptr, state_ptr, rate_CDN, channel, place, inside, batch, segment, segments,
    dim: tl.constexpr, states: tl.constexpr,
):  # fmt: skip
    """The state before a segment: the given one, through all segments before."""
    state_CDN = tl.zeros_like(rate_CDN)
    if state_ptr is not None:
        state_CDN += tl.load(state_ptr + batch * dim * states + place, mask=inside, other=0.0)
    if sums_ptr is not None:
        for earlier in range(segment):
            row = batch * segments + earlier
            step = tl.load(steps_ptr + row * dim + channel, mask=channel < dim, other=0.0)
            sum_CDN = tl.load(sums_ptr + row * dim * states + place, mask=inside, other=0.0)
            state_CDN = tl.exp2(step * rate_CDN) * state_CDN + sum_CDN
    return state_CDN


@triton.jit(do_not_specialize=["length", "tiles_each", "segments"])
def selective_sums(
    x_ptr, dt_ptr, rate_ptr, b_ptr, steps_ptr, sums_ptr, length, tiles_each, segments,
    dim: tl.constexpr, states: tl.constexpr, BACKWARD: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each segment's sum of steps [B, segments, D] and state from zero [B, segments, D, N].

    Backwards, the walk is from the last tile and row to the first, and the state is a_t dh_t; `x` is then dy, `b` c.
    """
    channel, state = channels_and_states(WIDE, BLOCK_D)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = (channel < dim) & (state < states)
    place = channel * states + state
    rate_CDN = load_rates(rate_ptr, place, inside)
    tiles = tl.cdiv(length, BLOCK_T)
    skip = batch * length
    sum_CDN = tl.zeros_like(rate_CDN)
    steps = tl.zeros_like(channel).to(tl.float32)
    for walked in range(segment * tiles_each, tl.minimum((segment + 1) * tiles_each, tiles)):
        tile = walked
        if BACKWARD:
            tile = tiles - 1 - walked
        row, first = tile * BLOCK_T, skip + tile * BLOCK_T
        steps_of = load_rows(dt_ptr + first * dim, row, BLOCK_T, length, channel, dim)
        inputs = load_rows(x_ptr + first * dim, row, BLOCK_T, length, channel, dim)
        writes = load_rows(b_ptr + first * states, row, BLOCK_T, length, state, states)
        for index in tl.static_range(BLOCK_T):
            dt = steps_of[BLOCK_T - 1 - index if BACKWARD else index].to(tl.float32)
            x = inputs[BLOCK_T - 1 - index if BACKWARD else index].to(tl.float32)
            b = writes[BLOCK_T - 1 - index if BACKWARD else index].to(tl.float32)
            gate_CDN = tl.exp2(dt * rate_CDN)
            if BACKWARD:
                sum_CDN = gate_CDN * (sum_CDN + x * b)
            else:
                sum_CDN = gate_CDN * sum_CDN + (dt * x) * b
            steps += dt
    row = batch * segments + segment
    tl.store(steps_ptr + row * dim + channel, steps, mask=channel < dim)
    tl.store(sums_ptr + row * dim * states + place, sum_CDN, mask=inside)


@triton.jit(do_not_specialize=["length", "tiles_each", "segments"])
def selective_forward(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, skip_ptr, state_ptr, steps_ptr, sums_ptr,
    y_ptr, final_ptr, starts_ptr, length, tiles_each, segments,
    dim: tl.constexpr, states: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y of one segment, the state behind the last, and in starts [B, tiles, D, N] those before the tiles."""
    channel, state = channels_and_states(WIDE, BLOCK_D)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = (channel < dim) & (state < states)
    place = channel * states + state
    rate_CDN = load_rates(rate_ptr, place, inside)
    tiles = tl.cdiv(length, BLOCK_T)
    skip = batch * length
    direct = tl.zeros_like(channel).to(tl.float32)
    if skip_ptr is not None:
        direct += tl.load(skip_ptr + channel, mask=channel < dim, other=0.0).to(tl.float32)
    h_CDN = enter_segment(
        steps_ptr, sums_ptr, state_ptr, rate_CDN, channel, place, inside, batch, segment, segments, dim, states
    )  # fmt: skip
    for tile in range(segment * tiles_each, tl.minimum((segment + 1) * tiles_each, tiles)):
        if starts_ptr is not None:
            tl.store(starts_ptr + (batch * tiles + tile) * dim * states + place, h_CDN, mask=inside)
        row, first = tile * BLOCK_T, skip + tile * BLOCK_T
        steps_of = load_rows(dt_ptr + first * dim, row, BLOCK_T, length, channel, dim)
        inputs = load_rows(x_ptr + first * dim, row, BLOCK_T, length, channel, dim)
        writes = load_rows(b_ptr + first * states, row, BLOCK_T, length, state, states)
        reads = load_rows(c_ptr + first * states, row, BLOCK_T, length, state, states)
        for step in tl.static_range(BLOCK_T):
            dt, x = steps_of[step].to(tl.float32), inputs[step].to(tl.float32)
            b, c = writes[step].to(tl.float32), reads[step].to(tl.float32)
            h_CDN = tl.exp2(dt * rate_CDN) * h_CDN + (dt * x) * b
            y = tl.sum(h_CDN * c, 2, keep_dims=True) + direct * x
            store_row(y_ptr + first * dim, y, step, row + step, length, channel, dim)
    tl.store(final_ptr + batch * dim * states + place, h_CDN, mask=inside & (segment == segments - 1))


@triton.jit(do_not_specialize=["length", "tiles_each", "segments"])
def selective_backward(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, skip_ptr, starts_ptr, dy_ptr, dfinal_ptr, steps_ptr, sums_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dskip_ptr, dstate_ptr, length, tiles_each, segments,
    dim: tl.constexpr, states: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment, counted from the last tile. Those of b and c are of these channels, [B, columns, T, N];
    those of the rates and the skip of this segment, [B, segments, D, N] and [B, segments, D]."""
    channel, state = channels_and_states(WIDE, BLOCK_D)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = (channel < dim) & (state < states)
    place = channel * states + state
    rate_CDN = load_rates(rate_ptr, place, inside)
    tiles = tl.cdiv(length, BLOCK_T)
    skip = batch * length
    along = (batch * tl.num_programs(0) + tl.program_id(0)) * length
    direct = tl.zeros_like(channel).to(tl.float32)
    if skip_ptr is not None:
        direct += tl.load(skip_ptr + channel, mask=channel < dim, other=0.0).to(tl.float32)
    # a_t dh_t of the token behind the segment.
    passed_CDN = enter_segment(
        steps_ptr, sums_ptr, dfinal_ptr, rate_CDN, channel, place, inside, batch, segment, segments, dim, states
    )  # fmt: skip
    drate_CDN = tl.zeros_like(rate_CDN)
    dskip = tl.zeros_like(channel).to(tl.float32)
    for walked in range(segment * tiles_each, tl.minimum((segment + 1) * tiles_each, tiles)):
        tile = tiles - 1 - walked
        h_CDN = tl.load(starts_ptr + (batch * tiles + tile) * dim * states + place, mask=inside, other=0.0)
        kept = (h_CDN,)
        start, first = tile * BLOCK_T, skip + tile * BLOCK_T
        steps_of = load_rows(dt_ptr + first * dim, start, BLOCK_T, length, channel, dim)
        inputs = load_rows(x_ptr + first * dim, start, BLOCK_T, length, channel, dim)
        writes = load_rows(b_ptr + first * states, start, BLOCK_T, length, state, states)
        reads = load_rows(c_ptr + first * states, start, BLOCK_T, length, state, states)
        gradients = load_rows(dy_ptr + first * dim, start, BLOCK_T, length, channel, dim)
        for step in tl.static_range(BLOCK_T):
            dt, x, b = (
                steps_of[step].to(tl.float32),
                inputs[step].to(tl.float32),
                writes[step].to(tl.float32),
            )
            h_CDN = tl.exp2(dt * rate_CDN) * h_CDN + (dt * x) * b
            kept += (h_CDN,)
        for step in tl.static_range(BLOCK_T - 1, -1, -1):
            row = start + step
            # Again, from the nearest cache: in registers they would leave room for few programs.
            dt = load_rows(dt_ptr + (first + step) * dim, row, 1, length, channel, dim)[0].to(tl.float32)
            x = load_rows(x_ptr + (first + step) * dim, row, 1, length, channel, dim)[0].to(tl.float32)
            b = load_rows(b_ptr + (first + step) * states, row, 1, length, state, states)[0].to(tl.float32)
            dy, c = gradients[step].to(tl.float32), reads[step].to(tl.float32)
            gate_CDN = tl.exp2(dt * rate_CDN)
            dh_CDN = passed_CDN + dy * c
            passed_CDN = gate_CDN * dh_CDN
            of_c = over_channels(kept[step + 1] * dy)
            of_b = over_channels(dh_CDN * (dt * x))
            store_row(dc_ptr + (along + start) * states, of_c, step, row, length, state, states)
            store_row(db_ptr + (along + start) * states, of_b, step, row, length, state, states)
            through = tl.sum(dh_CDN * b, 2, keep_dims=True)
            decayed_CDN = passed_CDN * kept[step]
            drate_CDN += decayed_CDN * dt
            ddt = x * through + tl.sum(decayed_CDN * rate_CDN, 2, keep_dims=True) * LOG_2
            dx = dt * through + direct * dy
            dskip += dy * x
            store_row(dx_ptr + first * dim, dx, step, row, length, channel, dim)
            store_row(ddt_ptr + first * dim, ddt, step, row, length, channel, dim)
    row = batch * segments + segment
    tl.store(drate_ptr + row * dim * states + place, drate_CDN, mask=inside)
    if skip_ptr is not None:
        tl.store(dskip_ptr + row * dim + channel, dskip, mask=channel < dim)
    tl.store(dstate_ptr + batch * dim * states + place, passed_CDN, mask=inside & (segment == segments - 1))


@triton.jit
def selective_step(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, skip_ptr, state_ptr, y_ptr,
    dim: tl.constexpr, states: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token, the state in place."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = tl.program_id(1).to(tl.int64)
    state_N = tl.arange(0, WIDE)
    mask_D, mask_N = column_D < dim, state_N < states
    mask_DN = mask_D[:, None] & mask_N[None, :]
    place_DN = column_D[:, None] * states + state_N[None, :]
    rate_DN = tl.load(rate_ptr + place_DN, mask=mask_DN, other=0.0).to(tl.float32)
    x_D = tl.load(x_ptr + batch * dim + column_D, mask=mask_D, other=0.0).to(tl.float32)
    dt_D = tl.load(dt_ptr + batch * dim + column_D, mask=mask_D, other=0.0).to(tl.float32)
    b_N = tl.load(b_ptr + batch * states + state_N, mask=mask_N, other=0.0).to(tl.float32)
    c_N = tl.load(c_ptr + batch * states + state_N, mask=mask_N, other=0.0).to(tl.float32)
    here_ptr = state_ptr + batch * dim * states + place_DN
    state_DN = tl.load(here_ptr, mask=mask_DN, other=0.0)
    state_DN = tl.exp(dt_D[:, None] * rate_DN) * state_DN + (dt_D * x_D)[:, None] * b_N[None, :]
    tl.store(here_ptr, state_DN, mask=mask_DN)
    y_D = tl.sum(state_DN * c_N[None, :], 1)
    if skip_ptr is not None:
        y_D += tl.load(skip_ptr + column_D, mask=mask_D, other=0.0).to(tl.float32) * x_D
    tl.store(y_ptr + batch * dim + column_D, y_D.to(y_ptr.dtype.element_ty), mask=mask_D)


def plan(
    x: Tensor, rate: Tensor, backward: bool = False
) -> tuple[Config, tuple[int, int, int], int, dict[str, Any]]:
    """Blocks, grid (channels, segments, batch), tiles of a segment and constants. Tiles are as long both ways."""
    batch, length, dim = x.shape
    states = rate.shape[1]
    config = choose("selective_scan", generation(), x.dtype, key=states, value=dim)
    if backward:
        walked = choose("selective_backward", generation(), x.dtype, key=states, value=dim)
        config = replace(walked, blocks={**config.blocks, **walked.blocks})
    columns, block = -(-dim // config.blocks["BLOCK_D"]), config.blocks["BLOCK_T"]
    segments, rows = cut_time(length, batch * columns, block)
    constants = {"dim": dim, "states": states, "WIDE": triton.next_power_of_2(states)}
    return config, (columns, segments, batch), rows // block, constants


def empty_sums(x: Tensor, rate: Tensor, segments: int) -> tuple[Tensor | None, Tensor | None]:
    """The sums of several segments, not yet written."""
    if segments == 1:
        return None, None
    batch, _, dim = x.shape
    steps = x.new_empty(batch, segments, dim, dtype=torch.float32)
    return steps, x.new_empty(batch, segments, dim, rate.shape[1], dtype=torch.float32)


def run_forward(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, final, starts = empty_forward(x, dt, rate, b, c, skip, state, keep)
    config, grid, tiles_each, constants = plan(x, rate)
    steps, sums = empty_sums(x, rate, grid[1])
    walk = (x.shape[1], tiles_each, grid[1])
    if sums is not None:
        launch(
            selective_sums,
            grid,
            x,
            dt,
            rate,
            b,
            steps,
            sums,
            *walk,
            BACKWARD=False,
            config=config,
            **constants,
        )
    launch(
        selective_forward, grid, x, dt, rate, b, c, skip, state, steps, sums, y, final,
        starts if keep else None, *walk, config=config, **constants,
    )  # fmt: skip
    return y, final, starts


def empty_forward(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state and, where they are kept, the states before the tiles, not yet written."""
    batch, length, dim = x.shape
    block = choose("selective_scan", generation(), x.dtype, key=rate.shape[1], value=dim).blocks["BLOCK_T"]
    final = x.new_empty(batch, *rate.shape, dtype=torch.float32)
    tiles = -(-length // block) if keep else 0
    starts = x.new_empty(batch, tiles, *rate.shape, dtype=torch.float32)
    return torch.empty_like(x), final, starts


def run_backward(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    starts: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, drate, db, dc, dskip, dstate = empty_backward(x, dt, rate, b, c, skip, starts, dy, dfinal)
    config, grid, tiles_each, constants = plan(x, rate, backward=True)
    columns, segments, batch = grid
    steps, sums = empty_sums(x, rate, segments)
    drates = torch.empty(batch, segments, *rate.shape, device=x.device, dtype=torch.float32)
    dskips = None if skip is None else drates.new_empty(batch, segments, x.shape[2])
    dbs, dcs = (drates.new_empty(batch, columns, *b.shape[1:]) for _ in range(2))
    walk = (x.shape[1], tiles_each, segments)
    if sums is not None:
        launch(
            selective_sums,
            grid,
            dy,
            dt,
            rate,
            c,
            steps,
            sums,
            *walk,
            BACKWARD=True,
            config=config,
            **constants,
        )
    launch(
        selective_backward, grid, x, dt, rate, b, c, skip, starts, dy, dfinal, steps, sums,
        dx, ddt, drates, dbs, dcs, dskips, dstate, *walk, config=config, **constants,
    )  # fmt: skip
    drate, db, dc = drates.sum((0, 1)).to(rate.dtype), dbs.sum(1).to(b.dtype), dcs.sum(1).to(c.dtype)
    if skip is not None and dskips is not None:
        dskip = dskips.sum((0, 1)).to(skip.dtype)
    return dx, ddt, drate, db, dc, dskip, dstate


def empty_backward(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    starts: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, rate, b, c, skip (empty where there is none) and the state, not yet written."""
    dstate = x.new_empty(x.shape[0], *rate.shape, dtype=torch.float32)
    dskip = x.new_empty(0) if skip is None else torch.empty_like(skip)
    dx, ddt, drate, db, dc = (torch.empty_like(value) for value in (x, dt, rate, b, c))
    return dx, ddt, drate, db, dc, dskip, dstate


_forward = torch.library.custom_op(
    "mixforge::selective_scan_forward", on_device(run_forward), mutates_args=()
)
_backward = torch.library.custom_op(
    "mixforge::selective_scan_backward", on_device(run_backward), mutates_args=()
)


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # Tensors of the meta device get this far only where launches are written down.
    made = run_forward if x.device.type == "meta" else empty_forward
    return made(x, dt, rate, b, c, skip, state, keep)


@_backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    starts: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = run_backward if x.device.type == "meta" else empty_backward
    return made(x, dt, rate, b, c, skip, starts, dy, dfinal)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dt, rate, b, c, skip, state, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(x, dt, rate, b, c, skip, output[2])
    # A gradient of the states before the tiles would be as large as they are, and zero.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, dt, rate, b, c, skip, starts = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dx, ddt, drate, db, dc, dskip, dstate = _backward(x, dt, rate, b, c, skip, starts, dy, dfinal)
    return (
        dx, ddt, drate, db, dc, None if skip is None else dskip, dstate if ctx.has_state else None, None,
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_keep)


def selective_scan_triton(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    skip_D: Tensor | None = None,
    state_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `selective_scan_reference`, on a GPU."""
    check_selective(x_BTD, dt_BTD, rate_DN, b_BTN, c_BTN, skip_D, state_BDN)
    check_limits(x_BTD, dt_BTD, rate_DN, b_BTN, c_BTN, skip_D)
    state = None if state_BDN is None else state_BDN.float().contiguous()
    skip = None if skip_D is None else skip_D.contiguous()
    inputs = tuple(value.contiguous() for value in (x_BTD, dt_BTD, rate_DN, b_BTN, c_BTN))
    y, final, _ = _forward(*inputs, skip, state, wants_gradient(*inputs, skip, state))
    return y, final


def check_limits(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor | None) -> None:
    """Raise ValueError where the kernels cannot run."""
    check_runs("x", x)
    check_dtypes(x=x, dt=dt, rate=rate, b=b, c=c, skip=skip)
    if rate.shape[1] > LARGEST_STATE:
        raise BeyondKernels(
            f"rate has {rate.shape[1]} states a channel; backend='triton' takes at most {LARGEST_STATE}"
        )


def selective_scan_step_triton(
    x_BD: Tensor,
    dt_BD: Tensor,
    rate_DN: Tensor,
    b_BN: Tensor,
    c_BN: Tensor,
    skip_D: Tensor | None,
    state_BDN: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: (y_BD, state_BDN), the float32 state in place.

    Where gradients are wanted, it is a sequence of one token, which has them. Raises ValueError where a shape, dtype or
    device does not fit.
    """
    check_selective(x_BD, dt_BD, rate_DN, b_BN, c_BN, skip_D, state_BDN, is_step=True)
    if wants_gradient(x_BD, dt_BD, rate_DN, b_BN, c_BN, skip_D, state_BDN):
        y_BTD, after_BDN = selective_scan_triton(
            x_BD[:, None], dt_BD[:, None], rate_DN, b_BN[:, None], c_BN[:, None], skip_D, state_BDN
        )
        return y_BTD[:, 0], after_BDN
    check_limits(x_BD, dt_BD, rate_DN, b_BN, c_BN, skip_D)
    check_state(state_BDN)
    inputs = tuple(value.contiguous() for value in (x_BD, dt_BD, rate_DN, b_BN, c_BN))
    y: Tensor = _step(*inputs, None if skip_D is None else skip_D.contiguous(), state_BDN)
    return y, state_BDN


def run_step(
    x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, state: Tensor
) -> Tensor:
    y = torch.empty_like(x)
    dim, states = rate.shape
    config = choose("selective_step", generation(), x.dtype, key=states, value=dim)
    grid = (-(-dim // config.blocks["BLOCK_D"]), x.shape[0])
    constants: dict[str, Any] = {"dim": dim, "states": states, "WIDE": triton.next_power_of_2(states)}
    launch(selective_step, grid, x, dt, rate, b, c, skip, state, y, config=config, **constants)
    return y


_step = torch.library.custom_op("mixforge::selective_scan_step", on_device(run_step), mutates_args=("state",))


@_step.register_fake
def _(
    x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, state: Tensor
) -> Tensor:
    return run_step(x, dt, rate, b, c, skip, state) if x.device.type == "meta" else torch.empty_like(x)
