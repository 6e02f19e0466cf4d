"""Triton form of Mamba's selective scan: `selective_scan` has the equations.

A program walks tiles of BLOCK_T tokens by BLOCK_D channels by all N states, with an associative scan over the tokens of
a tile; nothing of size [B, T, D, N] reaches memory. Where there are too few programs, the time is cut into segments as
in `gated_scan_triton`; the product of a segment's gates is exp(A sum dt). For the backward pass the state before each
tile is kept. It forms the states of a tile anew, and with them a_t h_{t-1} by the same scan, never by a difference;
with dh_t = C_t dy_t + a_{t+1} dh_{t+1}:

    d x_t = dt_t sum_n dh_t B_t + skip dy_t            d B_t = sum_d dh_t dt_t x_t
    d dt_t = sum_n dh_t (A a_t h_{t-1} + B_t x_t)      d C_t = sum_d h_t dy_t
    d A = sum_t dh_t dt_t a_t h_{t-1}                  d skip = sum_t dy_t x_t

Sums over programs are added up afterwards in a fixed order.

Source: Gu and Dao 2023 (arXiv 2312.00752, section 3.3.2 and appendix D), which recomputes states in backward.
"""

# Kernels are written in the language of Triton, whose values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.backend import BeyondKernels
from mixforge.kernels.blocks import Config, choose
from mixforge.kernels.gated_scan_triton import check_dtypes, check_state, compose, cut_time
from mixforge.kernels.launch import check_device, generation, launch, on_device
from mixforge.kernels.selective_scan import check_selective

# States of one channel: a tile holds all of them.
LARGEST_STATE = 64


@triton.jit
def compose_past(gate, value, past, later_gate, later_value, later_past):
    """`compose`, with what the last gate lets through, before its value is added."""
    through = later_gate * value
    return gate * later_gate, through + later_value, through + later_past


@triton.jit
def load_rows(pointer, row_T, inside_T, column_D, dim: tl.constexpr):
    """Rows of a [T, dim] matrix in float32, zeros outside."""
    mask = inside_T[:, None] & (column_D < dim)[None, :]
    offsets = row_T.to(tl.int64)[:, None] * dim + column_D[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def enter_segment(
    steps_ptr, sums_ptr, state_ptr, rate_DN, place_DN, mask_DN, column_D, batch, segment, segments,
    dim: tl.constexpr, states: tl.constexpr,
):  # fmt: skip
    """The state before a segment: the given one, through all segments before."""
    state_DN = tl.zeros_like(rate_DN)
    if state_ptr is not None:
        state_DN += tl.load(state_ptr + batch * dim * states + place_DN, mask=mask_DN, other=0.0)
    if sums_ptr is not None:
        for earlier in range(segment):
            row = batch * segments + earlier
            step_D = tl.load(steps_ptr + row * dim + column_D, mask=column_D < dim, other=0.0)
            sum_DN = tl.load(sums_ptr + row * dim * states + place_DN, mask=mask_DN, other=0.0)
            state_DN = tl.exp(step_D[:, None] * rate_DN) * state_DN + sum_DN
    return state_DN


@triton.jit(do_not_specialize=["length", "tiles_each", "segments"])
def selective_sums(
    x_ptr, dt_ptr, rate_ptr, b_ptr, steps_ptr, sums_ptr, length, tiles_each, segments,
    dim: tl.constexpr, states: tl.constexpr, BACKWARD: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each segment's sum of steps [B, segments, D] and state from zero [B, segments, D, N].

    Backwards, the walk is from the last tile and row to the first, with the step of the row after; `x` is then dy, and
    `b` is c.
    """
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    state_N = tl.arange(0, WIDE)
    mask_DN = (column_D < dim)[:, None] & (state_N < states)[None, :]
    place_DN = column_D[:, None] * states + state_N[None, :]
    rate_DN = tl.load(rate_ptr + place_DN, mask=mask_DN, other=0.0).to(tl.float32)
    tiles = tl.cdiv(length, BLOCK_T)
    skip = batch * length
    sum_DN = tl.zeros([BLOCK_D, WIDE], tl.float32)
    step_D = tl.zeros([BLOCK_D], tl.float32)
    for walked in range(segment * tiles_each, tl.minimum((segment + 1) * tiles_each, tiles)):
        row_T = walked * BLOCK_T + tl.arange(0, BLOCK_T)
        gate_T = row_T
        if BACKWARD:
            row_T = (tiles - walked) * BLOCK_T - 1 - tl.arange(0, BLOCK_T)
            gate_T = row_T + 1
        inside_T = row_T < length
        dt_TD = load_rows(dt_ptr + skip * dim, gate_T, gate_T < length, column_D, dim)
        write_TD = load_rows(x_ptr + skip * dim, row_T, inside_T, column_D, dim)
        if not BACKWARD:
            write_TD = write_TD * dt_TD
        b_TN = load_rows(b_ptr + skip * states, row_T, inside_T, state_N, states)
        gate_TDN = tl.exp(dt_TD[:, :, None] * rate_DN[None, :, :])
        value_TDN = write_TD[:, :, None] * b_TN[:, None, :]
        gate_TDN, value_TDN = tl.associative_scan((gate_TDN, value_TDN), 0, compose)
        last_T = (tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None, None]
        gate_DN = tl.sum(tl.where(last_T, gate_TDN, 0.0), 0)
        sum_DN = gate_DN * sum_DN + tl.sum(tl.where(last_T, value_TDN, 0.0), 0)
        step_D += tl.sum(dt_TD, 0)
    row = batch * segments + segment
    tl.store(steps_ptr + row * dim + column_D, step_D, mask=column_D < dim)
    tl.store(sums_ptr + row * dim * states + place_DN, sum_DN, mask=mask_DN)


@triton.jit(do_not_specialize=["length", "tiles_each", "segments"])
def selective_forward(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, skip_ptr, state_ptr, steps_ptr, sums_ptr,
    y_ptr, final_ptr, starts_ptr, length, tiles_each, segments,
    dim: tl.constexpr, states: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y of one segment, the state behind the last, and in starts [B, tiles, D, N] those before the tiles."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    state_N = tl.arange(0, WIDE)
    mask_DN = (column_D < dim)[:, None] & (state_N < states)[None, :]
    place_DN = column_D[:, None] * states + state_N[None, :]
    rate_DN = tl.load(rate_ptr + place_DN, mask=mask_DN, other=0.0).to(tl.float32)
    tiles = tl.cdiv(length, BLOCK_T)
    skip = batch * length
    state_DN = enter_segment(
        steps_ptr,
        sums_ptr,
        state_ptr,
        rate_DN,
        place_DN,
        mask_DN,
        column_D,
        batch,
        segment,
        segments,
        dim,
        states,
    )
    for tile in range(segment * tiles_each, tl.minimum((segment + 1) * tiles_each, tiles)):
        if starts_ptr is not None:
            start = (batch * tiles + tile) * dim * states
            tl.store(starts_ptr + start + place_DN, state_DN, mask=mask_DN)
        row_T = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        inside_T = row_T < length
        dt_TD = load_rows(dt_ptr + skip * dim, row_T, inside_T, column_D, dim)
        x_TD = load_rows(x_ptr + skip * dim, row_T, inside_T, column_D, dim)
        b_TN = load_rows(b_ptr + skip * states, row_T, inside_T, state_N, states)
        c_TN = load_rows(c_ptr + skip * states, row_T, inside_T, state_N, states)
        gate_TDN = tl.exp(dt_TD[:, :, None] * rate_DN[None, :, :])
        h_TDN = (dt_TD * x_TD)[:, :, None] * b_TN[:, None, :]
        gate_TDN, h_TDN = tl.associative_scan((gate_TDN, h_TDN), 0, compose)
        h_TDN += gate_TDN * state_DN[None, :, :]
        y_TD = tl.sum(h_TDN * c_TN[:, None, :], 2)
        if skip_ptr is not None:
            y_TD += (
                tl.load(skip_ptr + column_D, mask=column_D < dim, other=0.0).to(tl.float32)[None, :] * x_TD
            )
        offsets = row_T.to(tl.int64)[:, None] * dim + column_D[None, :]
        mask_TD = inside_T[:, None] & (column_D < dim)[None, :]
        tl.store(y_ptr + skip * dim + offsets, y_TD.to(y_ptr.dtype.element_ty), mask=mask_TD)
        last_T = (tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None, None]
        state_DN = tl.sum(tl.where(last_T, h_TDN, 0.0), 0)
    tl.store(final_ptr + batch * dim * states + place_DN, state_DN, mask=mask_DN & (segment == segments - 1))


@triton.jit(do_not_specialize=["length", "tiles_each", "segments"])
def selective_backward(
    x_ptr, dt_ptr, rate_ptr, b_ptr, c_ptr, skip_ptr, starts_ptr, dy_ptr, dfinal_ptr, steps_ptr, sums_ptr,
    dx_ptr, ddt_ptr, drate_ptr, db_ptr, dc_ptr, dskip_ptr, dstate_ptr, length, tiles_each, segments,
    dim: tl.constexpr, states: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment, counted from the last tile. Those of b and c are of these channels, [B, columns, T, N];
    those of the rates and the skip of this segment, [B, segments, D, N] and [B, segments, D]."""
    column = tl.program_id(0)
    column_D = column * BLOCK_D + tl.arange(0, BLOCK_D)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    state_N = tl.arange(0, WIDE)
    mask_DN = (column_D < dim)[:, None] & (state_N < states)[None, :]
    place_DN = column_D[:, None] * states + state_N[None, :]
    rate_DN = tl.load(rate_ptr + place_DN, mask=mask_DN, other=0.0).to(tl.float32)
    tiles = tl.cdiv(length, BLOCK_T)
    skip = batch * length
    dh_DN = enter_segment(
        steps_ptr,
        sums_ptr,
        dfinal_ptr,
        rate_DN,
        place_DN,
        mask_DN,
        column_D,
        batch,
        segment,
        segments,
        dim,
        states,
    )
    drate_DN = tl.zeros([BLOCK_D, WIDE], tl.float32)
    dskip_D = tl.zeros([BLOCK_D], tl.float32)
    for walked in range(segment * tiles_each, tl.minimum((segment + 1) * tiles_each, tiles)):
        tile = tiles - 1 - walked
        row_T = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        inside_T = row_T < length
        mask_TD = inside_T[:, None] & (column_D < dim)[None, :]
        offsets = row_T.to(tl.int64)[:, None] * dim + column_D[None, :]
        dt_TD = load_rows(dt_ptr + skip * dim, row_T, inside_T, column_D, dim)
        next_TD = load_rows(dt_ptr + skip * dim, row_T + 1, row_T + 1 < length, column_D, dim)
        dy_TD = load_rows(dy_ptr + skip * dim, row_T, inside_T, column_D, dim)
        c_TN = load_rows(c_ptr + skip * states, row_T, inside_T, state_N, states)
        gate_TDN = tl.exp(next_TD[:, :, None] * rate_DN[None, :, :])
        dh_TDN = dy_TD[:, :, None] * c_TN[:, None, :]
        gate_TDN, dh_TDN = tl.associative_scan((gate_TDN, dh_TDN), 0, compose, reverse=True)
        dh_TDN += gate_TDN * dh_DN[None, :, :]
        dh_DN = tl.sum(tl.where((tl.arange(0, BLOCK_T) == 0)[:, None, None], dh_TDN, 0.0), 0)

        x_TD = load_rows(x_ptr + skip * dim, row_T, inside_T, column_D, dim)
        b_TN = load_rows(b_ptr + skip * states, row_T, inside_T, state_N, states)
        start = (batch * tiles + tile) * dim * states
        start_DN = tl.load(starts_ptr + start + place_DN, mask=mask_DN, other=0.0)
        gate_TDN = tl.exp(dt_TD[:, :, None] * rate_DN[None, :, :])
        h_TDN = (dt_TD * x_TD)[:, :, None] * b_TN[:, None, :]
        gate_TDN, h_TDN, past_TDN = tl.associative_scan(
            (gate_TDN, h_TDN, tl.zeros_like(h_TDN)), 0, compose_past
        )
        h_TDN += gate_TDN * start_DN[None, :, :]
        past_TDN += gate_TDN * start_DN[None, :, :]

        along_TN = ((batch * tl.num_programs(0) + column) * length + row_T.to(tl.int64))[:, None] * states
        along_TN += state_N[None, :]
        mask_TN = inside_T[:, None] & (state_N < states)[None, :]
        tl.store(dc_ptr + along_TN, tl.sum(h_TDN * dy_TD[:, :, None], 1), mask=mask_TN)
        tl.store(db_ptr + along_TN, tl.sum(dh_TDN * (dt_TD * x_TD)[:, :, None], 1), mask=mask_TN)
        through_TD = tl.sum(dh_TDN * b_TN[:, None, :], 2)
        past_TDN *= dh_TDN
        ddt_TD = x_TD * through_TD + tl.sum(past_TDN * rate_DN[None, :, :], 2)
        drate_DN += tl.sum(past_TDN * dt_TD[:, :, None], 0)
        dx_TD = dt_TD * through_TD
        if skip_ptr is not None:
            skip_D = tl.load(skip_ptr + column_D, mask=column_D < dim, other=0.0).to(tl.float32)
            dx_TD += skip_D[None, :] * dy_TD
            dskip_D += tl.sum(dy_TD * x_TD, 0)
        tl.store(dx_ptr + skip * dim + offsets, dx_TD.to(dx_ptr.dtype.element_ty), mask=mask_TD)
        tl.store(ddt_ptr + skip * dim + offsets, ddt_TD.to(ddt_ptr.dtype.element_ty), mask=mask_TD)
    row = batch * segments + segment
    tl.store(drate_ptr + row * dim * states + place_DN, drate_DN, mask=mask_DN)
    if skip_ptr is not None:
        tl.store(dskip_ptr + row * dim + column_D, dskip_D, mask=column_D < dim)
    first_D = tl.load(dt_ptr + skip * dim + column_D, mask=column_D < dim, other=0.0).to(tl.float32)
    tl.store(
        dstate_ptr + batch * dim * states + place_DN, tl.exp(first_D[:, None] * rate_DN) * dh_DN,
        mask=mask_DN & (segment == segments - 1),
    )  # fmt: skip


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


def plan(x: Tensor, rate: Tensor) -> tuple[Config, tuple[int, int, int], int, dict[str, Any]]:
    """Blocks, grid (channels, segments, batch), tiles of a segment and constants, the same forwards and backwards."""
    batch, length, dim = x.shape
    states = rate.shape[1]
    config = choose("selective_scan", generation(), x.dtype, key=states, value=dim)
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
    check_device(x=x, dt=dt, rate=rate, b=b, c=c, skip=skip, state=state)
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
    config, grid, tiles_each, constants = plan(x, rate)
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
    check_runs(x_BTD, dt_BTD, rate_DN, b_BTN, c_BTN, skip_D)
    state = None if state_BDN is None else state_BDN.float().contiguous()
    skip = None if skip_D is None else skip_D.contiguous()
    inputs = tuple(value.contiguous() for value in (x_BTD, dt_BTD, rate_DN, b_BTN, c_BTN))
    keep = torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in (*inputs, skip, state)
    )
    y, final, _ = _forward(*inputs, skip, state, keep)
    return y, final


def check_runs(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor | None) -> None:
    """Raise ValueError where the kernels cannot run."""
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
    """One token: (y_BD, state_BDN), the float32 state in place. It has no gradient."""
    check_runs(x_BD, dt_BD, rate_DN, b_BN, c_BN, skip_D)
    check_selective(x_BD[:, None], dt_BD[:, None], rate_DN, b_BN[:, None], c_BN[:, None], skip_D, state_BDN)
    check_state(state_BDN, state_BDN.shape)
    inputs = tuple(value.contiguous() for value in (x_BD, dt_BD, rate_DN, b_BN, c_BN))
    y: Tensor = _step(*inputs, None if skip_D is None else skip_D.contiguous(), state_BDN)
    return y, state_BDN


def run_step(
    x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, state: Tensor
) -> Tensor:
    check_device(x=x, dt=dt, rate=rate, b=b, c=c, skip=skip, state=state)
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
