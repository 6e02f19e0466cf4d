"""Triton form of the short causal depthwise convolution: `short_conv` has the equation.

A tile of BLOCK_T tokens and BLOCK_D channels reads its taps from the tokens before it, or from the state where those
lie before the first token. Nothing but the inputs is kept for the backward pass, which forms p_t, the gradient before
the activation, anew:

    d w_j = sum_t p_t x_{t-W+1+j},    d bias = sum_t p_t,    d x_s = sum_j w_j p_{s+W-1-j}.

Programs that walk over rows each sum a weight gradient of their own; the sums are added up in a fixed order.

Source: Gu and Dao 2023 (arXiv 2312.00752, section 3.4).
"""

# Kernels are written in the language of Triton, whose values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.blocks import choose
from mixforge.kernels.launch import check_dtypes, check_runs, generation, launch, on_device
from mixforge.kernels.operands import wants_gradient
from mixforge.kernels.packed import write_untouched
from mixforge.kernels.short_conv import check_conv

# Tokens whose weight gradients one program sums up.
ROWS_EACH = 512


@triton.jit
def sequence_of(bounds_ptr, owner_ptr, time_T, inside_T, batch, length):
    """For each token the number of its sequence, and where that begins and ends."""
    if bounds_ptr is not None:
        owner_T = tl.load(owner_ptr + time_T, mask=inside_T, other=0).to(tl.int64)
        begin_T = tl.load(bounds_ptr + owner_T).to(tl.int32)
        end_T = tl.load(bounds_ptr + owner_T + 1).to(tl.int32)
    else:
        owner_T = batch + tl.zeros_like(time_T).to(tl.int64)
        begin_T = tl.zeros_like(time_T)
        end_T = begin_T + length
    return owner_T, begin_T, end_T


@triton.jit
def load_tap(
    x_ptr, state_ptr, time_T, begin_T, owner_T, inside_T, column_D, dim: tl.constexpr, past: tl.constexpr,
    tap: tl.constexpr,
):  # fmt: skip
    """What tap `tap` of each token reads."""
    mask_TD = inside_T[:, None] & (column_D < dim)[None, :]
    source_T = time_T - past + tap
    offsets = source_T.to(tl.int64)[:, None] * dim + column_D[None, :]
    value = tl.load(x_ptr + offsets, mask=mask_TD & (source_T >= begin_T)[:, None], other=0.0).to(tl.float32)
    if state_ptr is not None and tap < past:
        slot_T = source_T - begin_T + past
        before = (owner_T[:, None] * dim + column_D[None, :]) * past + slot_T[:, None]
        mask_before = mask_TD & (source_T < begin_T)[:, None]
        value += tl.load(state_ptr + before, mask=mask_before, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["length"])
def conv_forward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, bounds_ptr, owner_ptr, y_ptr, after_ptr, length,
    dim: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y of a tile, and the states behind the sequences that end in it."""
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    time_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = tl.program_id(2).to(tl.int64)
    inside_T = time_T < length
    mask_D = column_D < dim
    mask_TD = inside_T[:, None] & mask_D[None, :]
    skip = batch * length * dim
    past: tl.constexpr = TAPS - 1
    owner_T, begin_T, end_T = sequence_of(bounds_ptr, owner_ptr, time_T, inside_T, batch, length)
    # All loads before the first store, which none of them would pass.
    values = ()
    for tap in tl.static_range(TAPS):
        values += (
            load_tap(x_ptr + skip, state_ptr, time_T, begin_T, owner_T, inside_T, column_D, dim, past, tap),
        )
    y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column_D, mask=mask_D, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        weight = tl.load(weight_ptr + column_D * TAPS + tap, mask=mask_D, other=0.0).to(tl.float32)
        y += weight[None, :] * values[tap]
    if SILU:
        y = y * tl.sigmoid(y)
    offsets = time_T.to(tl.int64)[:, None] * dim + column_D[None, :]
    tl.store(y_ptr + skip + offsets, y.to(y_ptr.dtype.element_ty), mask=mask_TD)
    # What the last token's taps but the first read is the state behind it. Few tiles have one.
    last_T = inside_T & (time_T == end_T - 1)
    if tl.max(last_T.to(tl.int32), 0) > 0:
        slot = (owner_T[:, None] * dim + column_D[None, :]) * past
        for tap in tl.static_range(1, TAPS):
            place = after_ptr + slot + (tap - 1)
            tl.store(place, values[tap].to(after_ptr.dtype.element_ty), mask=mask_TD & last_T[:, None])


@triton.jit(do_not_specialize=["length", "rows_each", "splits"])
def conv_weight_gradient(
    x_ptr, weight_ptr, bias_ptr, state_ptr, bounds_ptr, owner_ptr, dy_ptr, dpre_ptr, partial_ptr,
    length, rows_each, splits, dim: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients before the activation, where there is one, and partial sums [splits, TAPS + 1, D] of those of the
    weight and, behind them, the bias."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    mask_D = column_D < dim
    skip = batch * length * dim
    past: tl.constexpr = TAPS - 1
    # Sums for each row of a tile, and over its rows at the end: a sum over rows crosses threads.
    sums = ()
    for _ in tl.static_range(TAPS + 1):
        sums += (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
    for start in range(split * rows_each, tl.minimum((split + 1) * rows_each, length), BLOCK_T):
        time_T = start + tl.arange(0, BLOCK_T)
        inside_T = time_T < length
        mask_TD = inside_T[:, None] & mask_D[None, :]
        offsets = time_T.to(tl.int64)[:, None] * dim + column_D[None, :]
        owner_T, begin_T, _end = sequence_of(bounds_ptr, owner_ptr, time_T, inside_T, batch, length)
        values = ()
        for tap in tl.static_range(TAPS):
            values += (
                load_tap(
                    x_ptr + skip, state_ptr, time_T, begin_T, owner_T, inside_T, column_D, dim, past, tap
                ),
            )
        slope = tl.load(dy_ptr + skip + offsets, mask=mask_TD, other=0.0).to(tl.float32)
        if SILU:
            pre = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            if bias_ptr is not None:
                pre += tl.load(bias_ptr + column_D, mask=mask_D, other=0.0).to(tl.float32)[None, :]
            for tap in tl.static_range(TAPS):
                weight = tl.load(weight_ptr + column_D * TAPS + tap, mask=mask_D, other=0.0).to(tl.float32)
                pre += weight[None, :] * values[tap]
            sigmoid = tl.sigmoid(pre)
            slope = slope * sigmoid * (1.0 + pre * (1.0 - sigmoid))
            tl.store(dpre_ptr + skip + offsets, slope.to(dpre_ptr.dtype.element_ty), mask=mask_TD)
        values += (tl.full([BLOCK_T, BLOCK_D], 1.0, tl.float32),)
        later = ()
        for tap in tl.static_range(TAPS + 1):
            later += (sums[tap] + slope * values[tap],)
        sums = later
    place = (batch * splits + split) * (TAPS + 1) * dim + column_D
    for tap in tl.static_range(TAPS + 1):
        tl.store(partial_ptr + place + tap * dim, tl.sum(sums[tap], 0), mask=mask_D)


@triton.jit(do_not_specialize=["length"])
def conv_input_gradient(
    dpre_ptr, weight_ptr, dafter_ptr, bounds_ptr, owner_ptr, dx_ptr, length, dim: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d x of a tile, from the tokens that read it and the state that it became part of."""
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    time_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = tl.program_id(2).to(tl.int64)
    inside_T = time_T < length
    mask_D = column_D < dim
    mask_TD = inside_T[:, None] & mask_D[None, :]
    skip = batch * length * dim
    past: tl.constexpr = TAPS - 1
    owner_T, _, end_T = sequence_of(bounds_ptr, owner_ptr, time_T, inside_T, batch, length)
    slot_T = time_T - end_T + past
    place = (owner_T[:, None] * dim + column_D[None, :]) * past + slot_T[:, None]
    dx = tl.load(dafter_ptr + place, mask=mask_TD & (slot_T >= 0)[:, None], other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS):
        reader_T = time_T + (past - tap)
        offsets = reader_T.to(tl.int64)[:, None] * dim + column_D[None, :]
        mask = mask_TD & (reader_T < end_T)[:, None]
        dpre = tl.load(dpre_ptr + skip + offsets, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column_D * TAPS + tap, mask=mask_D, other=0.0).to(tl.float32)
        dx += weight[None, :] * dpre
    offsets = time_T.to(tl.int64)[:, None] * dim + column_D[None, :]
    tl.store(dx_ptr + skip + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask_TD)


@triton.jit(do_not_specialize=["length"])
def conv_state_gradient(
    dpre_ptr, weight_ptr, dafter_ptr, bounds_ptr, dstate_ptr, length, dim: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one sequence's first state."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sequence = tl.program_id(1).to(tl.int64)
    mask_D = column_D < dim
    past: tl.constexpr = TAPS - 1
    if bounds_ptr is not None:
        begin = tl.load(bounds_ptr + sequence).to(tl.int64)
        size = tl.load(bounds_ptr + sequence + 1).to(tl.int64) - begin
    else:
        begin = sequence * length
        size = length
    state_row = (sequence * dim + column_D) * past
    for slot in tl.static_range(TAPS - 1):
        # A sequence shorter than the state leaves some of what it was given in the state behind it.
        kept = mask_D & (slot >= size)
        total = tl.load(dafter_ptr + state_row + slot - size, mask=kept, other=0.0).to(tl.float32)
        for tap in tl.static_range(slot + 1):
            reached = mask_D & (slot - tap < size)
            offsets = (begin + slot - tap) * dim + column_D
            dpre = tl.load(dpre_ptr + offsets, mask=reached, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + column_D * TAPS + tap, mask=mask_D, other=0.0).to(tl.float32)
            total += weight * dpre
        tl.store(dstate_ptr + state_row + slot, total.to(dstate_ptr.dtype.element_ty), mask=mask_D)


@triton.jit
def conv_step(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, dim: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token, the state in place."""
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(1).to(tl.int64) * dim + column_D
    mask_D = column_D < dim
    past: tl.constexpr = TAPS - 1
    x = tl.load(x_ptr + row, mask=mask_D, other=0.0).to(tl.float32)
    y = x * tl.load(weight_ptr + column_D * TAPS + past, mask=mask_D, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column_D, mask=mask_D, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        value = tl.load(state_ptr + row * past + tap, mask=mask_D, other=0.0)
        weight = tl.load(weight_ptr + column_D * TAPS + tap, mask=mask_D, other=0.0).to(tl.float32)
        y += weight * value.to(tl.float32)
        if tap > 0:
            tl.store(state_ptr + row * past + (tap - 1), value, mask=mask_D)
    if past > 0:
        tl.store(state_ptr + row * past + (past - 1), x.to(state_ptr.dtype.element_ty), mask=mask_D)
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=mask_D)


def owners(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """For each token the number of its sequence, int32 [T]; None where sequences are not packed."""
    if cu_seqlens is None:
        return None
    time_T = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return (torch.searchsorted(cu_seqlens, time_T, right=True) - 1).int()


def run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, after = empty_forward(x, weight, cu_seqlens)
    if cu_seqlens is not None:
        write_untouched(after, state)
    batch, length, dim = x.shape
    config = choose("conv_forward", generation(), x.dtype, key=dim)
    grid = (-(-length // config.blocks["BLOCK_T"]), -(-dim // config.blocks["BLOCK_D"]), batch)
    owner = owners(cu_seqlens, length)
    shape: dict[str, Any] = {"dim": dim, "TAPS": weight.shape[1], "SILU": silu}
    args = (x, weight, bias, state, cu_seqlens, owner, y, after, length)
    launch(conv_forward, grid, *args, config=config, **shape)
    return y, after


def empty_forward(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the states behind the sequences, not yet written."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x), x.new_empty(sequences, x.shape[2], weight.shape[1] - 1)


def run_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dafter: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias, dstate = empty_backward(x, weight, bias, state)
    batch, length, dim = x.shape
    taps = weight.shape[1]
    owner = owners(cu_seqlens, length)
    splits = -(-length // ROWS_EACH)
    partial = x.new_empty(batch * splits, taps + 1, dim, dtype=torch.float32)
    dpre = torch.empty_like(x) if silu else dy
    config = choose("conv_weight_gradient", generation(), x.dtype, key=dim)
    columns = -(-dim // config.blocks["BLOCK_D"])
    launch(
        conv_weight_gradient, (columns, splits, batch), x, weight, bias, state, cu_seqlens, owner, dy,
        dpre if silu else None, partial, length, ROWS_EACH, splits, dim=dim, TAPS=taps, SILU=silu,
        config=config,
    )  # fmt: skip
    total = partial.sum(0)
    dweight = total[:taps].t().to(weight.dtype).contiguous()
    # A copy: of one tap or one channel the weight's gradient is a view of the same sums, and torch takes no two of them.
    dbias = dbias if bias is None else total[taps].to(bias.dtype, copy=True)
    config = choose("conv_input_gradient", generation(), x.dtype, key=dim)
    grid = (-(-length // config.blocks["BLOCK_T"]), -(-dim // config.blocks["BLOCK_D"]), batch)
    args = (dpre, weight, dafter, cu_seqlens, owner, dx, length)
    launch(conv_input_gradient, grid, *args, dim=dim, TAPS=taps, config=config)
    if state is not None and taps > 1:
        config = choose("conv_step", generation(), x.dtype, key=dim)
        grid_N = (-(-dim // config.blocks["BLOCK_D"]), state.shape[0])
        args_N = (dpre, weight, dafter, cu_seqlens, dstate, length)
        launch(conv_state_gradient, grid_N, *args_N, dim=dim, TAPS=taps, config=config)
    return dx, dweight, dbias, dstate


def empty_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and state, not yet written; empty where there is no bias or state."""
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    dstate = x.new_empty(0) if state is None else torch.empty_like(state)
    return torch.empty_like(x), torch.empty_like(weight), dbias, dstate


_forward = torch.library.custom_op("mixforge::short_conv_forward", on_device(run_forward), mutates_args=())
_backward = torch.library.custom_op("mixforge::short_conv_backward", on_device(run_backward), mutates_args=())


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # Tensors of the meta device get this far only where launches are written down.
    if x.device.type == "meta":
        return run_forward(x, weight, bias, silu, state, cu_seqlens)
    return empty_forward(x, weight, cu_seqlens)


@_backward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dafter: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.device.type == "meta":
        return run_backward(x, weight, bias, silu, state, cu_seqlens, dy, dafter)
    return empty_backward(x, weight, bias, state)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.silu, state, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, state, cu_seqlens)


def _differentiate(ctx: Any, dy: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dstate = _backward(
        x, weight, bias, ctx.silu, state, cu_seqlens, dy.contiguous(), dafter.contiguous()
    )
    return dx, dweight, None if bias is None else dbias, None, None if state is None else dstate, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def short_conv_triton(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    activation: Literal["none", "silu"] = "none",
    state_BDW: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `short_conv_reference`, on a GPU."""
    check_conv(x_BTD, weight_DW, bias_D, activation, state_BDW, cu_seqlens)
    check_runs("x", x_BTD)
    check_dtypes(x=x_BTD, weight=weight_DW, bias=bias_D, state=state_BDW)
    y, after = _forward(
        x_BTD.contiguous(),
        weight_DW.contiguous(),
        None if bias_D is None else bias_D.contiguous(),
        activation == "silu",
        None if state_BDW is None else state_BDW.contiguous(),
        cu_seqlens,
    )
    return y, after


def short_conv_step_triton(
    x_BD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    activation: Literal["none", "silu"],
    state_BDW: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: (y_BD, state [B, D, W-1]), the state in place.

    Where gradients are wanted, it is a sequence of one token, which has them. Raises ValueError where a shape, dtype or
    device does not fit.
    """
    check_conv(x_BD, weight_DW, bias_D, activation, state_BDW, is_step=True)
    if wants_gradient(x_BD, weight_DW, bias_D, state_BDW):
        y_BTD, after_BDW = short_conv_triton(x_BD[:, None], weight_DW, bias_D, activation, state_BDW)
        return y_BTD[:, 0], after_BDW
    check_runs("x", x_BD)
    check_dtypes(x=x_BD, weight=weight_DW, bias=bias_D, state=state_BDW)
    if not state_BDW.is_contiguous():
        raise ValueError(f"state must be contiguous, got strides {list(state_BDW.stride())}")
    bias = None if bias_D is None else bias_D.contiguous()
    y: Tensor = _step(x_BD.contiguous(), weight_DW.contiguous(), bias, activation == "silu", state_BDW)
    return y, state_BDW


def run_step(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor) -> Tensor:
    y = torch.empty_like(x)
    dim = x.shape[1]
    config = choose("conv_step", generation(), x.dtype, key=dim)
    grid = (-(-dim // config.blocks["BLOCK_D"]), x.shape[0])
    shape: dict[str, Any] = {"dim": dim, "TAPS": weight.shape[1], "SILU": silu}
    launch(conv_step, grid, x, weight, bias, state, y, config=config, **shape)
    return y


_step = torch.library.custom_op("mixforge::short_conv_step", on_device(run_step), mutates_args=("state",))


@_step.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor) -> Tensor:
    return run_step(x, weight, bias, silu, state) if x.device.type == "meta" else torch.empty_like(x)
