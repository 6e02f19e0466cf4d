"""Short causal depthwise convolution y_t = act(bias + sum_j w_j x_{t-W+1+j}), j = 0 .. W-1, W from 2 to 8.

Source: Gu and Dao 2023 (arXiv 2312.00752, section 3.4), the convolution in front of the selective scan.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.operands import check_alike, check_axes, check_shape, states_of
from mixforge.kernels.tracing import unaliased

MOST_TAPS = 8


def short_conv_reference(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    activation: Literal["none", "silu"] = "none",
    state_BDW: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A sum of shifted inputs.

    `state_BDW` [B, D, W-1] holds the inputs before the first token, oldest first; None is zeros. Returns y_BTD and
    the state after the last token, both in the dtype of x. Of packed sequences (`packed`), states are [N, D, W-1].

    Raises ValueError where a shape, dtype or device does not fit, or there is no such activation.
    """
    check_conv(x_BTD, weight_DW, bias_D, activation, state_BDW, cu_seqlens)
    if cu_seqlens is not None:
        return each_sequence(
            short_conv_reference, x_BTD, weight_DW, bias_D, activation, state_BDW, cu_seqlens.tolist()
        )
    width, length = weight_DW.shape[1], x_BTD.shape[1]
    x_BDT = with_past(x_BTD, width, state_BDW)
    y_BDT = torch.zeros_like(x_BDT[:, :, :length])
    for tap in range(width):
        y_BDT = y_BDT + weight_DW[:, tap, None] * x_BDT[:, :, tap : tap + length]
    if bias_D is not None:
        y_BDT = y_BDT + bias_D[:, None]
    y_BDT = F.silu(y_BDT) if activation == "silu" else y_BDT
    return y_BDT.transpose(1, 2).to(x_BTD.dtype), x_BDT[:, :, length:].clone()


def short_conv_torch(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    activation: Literal["none", "silu"] = "none",
    state_BDW: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `short_conv_reference`, by torch's depthwise convolution: 2 W D matmul FLOPs a token."""
    check_conv(x_BTD, weight_DW, bias_D, activation, state_BDW, cu_seqlens)
    width, length = weight_DW.shape[1], x_BTD.shape[1]
    if cu_seqlens is None:
        x_BDT = with_past(x_BTD, width, state_BDW)
        after = x_BDT[:, :, length:].clone()
    else:
        x_BDT, place_T, end_NW = packed_with_past(x_BTD, width, state_BDW, cu_seqlens)
        after = x_BDT[0, :, end_NW].transpose(0, 1)
    bias = None if bias_D is None else bias_D.to(x_BTD.dtype)
    y_BTD = Convolution.apply(x_BDT, weight_DW.to(x_BTD.dtype), bias)  # type: ignore[no-untyped-call]
    if cu_seqlens is not None:
        y_BTD = y_BTD[:, place_T]
    return F.silu(y_BTD) if activation == "silu" else y_BTD, after


class Convolution(torch.autograd.Function):
    """y_BTD of x [B, D, T + W - 1], the weights [D, W] and a bias [D] or None.

    It is torch's, as a picture of one row whose channels come last, which is how tokens lie in memory: nothing is copied
    to turn it round, and it takes a half of the time of a convolution in one dimension. The gradient of the weights is
    ours: a product and a sum for each tap take half of the time of torch's.
    """

    @staticmethod
    def forward(ctx: Any, x_BDS: Tensor, weight_DW: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BDS, weight_DW)
        ctx.bias_dtype = None if bias_D is None else bias_D.dtype
        y_BD1T = F.conv2d(x_BDS[:, :, None], weight_DW[:, None, None], bias_D, groups=len(weight_DW))
        return unaliased(y_BD1T.squeeze(2).transpose(1, 2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_BDS, weight_DW = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx_BDS = dweight_DW = dbias_D = None
        if of_x:
            # They differ in dtype from what was given where autocast is on.
            row = (x_BDS.to(dy_BTD.dtype)[:, :, None], weight_DW.to(dy_BTD.dtype)[:, None, None])
            dy_BDT = dy_BTD.transpose(1, 2)
            how = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], len(weight_DW), [True, False, False])
            dx_BD1S = torch.ops.aten.convolution_backward(dy_BDT[:, :, None], *row, *how)[0]
            dx_BDS = dx_BD1S.squeeze(2).to(x_BDS.dtype)
        if of_weight:
            wide = torch.promote_types(dy_BTD.dtype, torch.float32)
            x_BSD, dy = x_BDS.transpose(1, 2).to(wide), dy_BTD.to(wide)
            product, length = torch.empty_like(dy), dy.shape[1]
            dweight_DW = torch.empty_like(weight_DW, dtype=wide)
            for tap in range(weight_DW.shape[1]):
                torch.mul(x_BSD[:, tap : tap + length], dy, out=product)
                dweight_DW[:, tap] = product.sum((0, 1))
            dweight_DW = dweight_DW.to(weight_DW.dtype)
        if of_bias:
            dbias_D = dy_BTD.sum((0, 1)).to(ctx.bias_dtype)
        return dx_BDS, dweight_DW, dbias_D


def check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    is_step: bool = False,
) -> None:
    """Raise ValueError where a shape, dtype or device does not fit, or there is no such activation."""
    check_axes("x", x, "batch, dim" if is_step else "batch, time, dim")
    dim = x.shape[-1]
    check_shape("weight", weight, (dim, "taps"))
    taps = weight.shape[1]
    if not 1 <= taps <= MOST_TAPS:
        raise ValueError(f"weight has {taps} taps; it must have 1 to {MOST_TAPS}")
    check_shape("bias", bias, (dim,))
    if activation not in ("none", "silu"):
        raise ValueError(f"activation must be none or silu, got {activation!r}")
    check_shape("state", state, (states_of(x, cu_seqlens), dim, taps - 1), is_needed=is_step)
    check_alike(x=x, weight=weight, bias=bias, state=state)


def each_sequence(
    operation: Callable[..., tuple[Tensor, Tensor]],
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    activation: Literal["none", "silu"],
    state_BDW: Tensor | None,
    bounds: list[int],
) -> tuple[Tensor, Tensor]:
    """An operation over packed sequences, one after the other."""
    pieces = []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        state = None if state_BDW is None else state_BDW[n : n + 1]
        pieces.append(operation(x_BTD[:, begin:end], weight_DW, bias_D, activation, state))
    return torch.cat([y for y, _ in pieces], 1), torch.cat([after for _, after in pieces])


def with_past(x_BTD: Tensor, width: int, state_BDW: Tensor | None) -> Tensor:
    """The inputs behind the width - 1 inputs that came before; channels are named before time, and lie after it."""
    if state_BDW is None:
        return F.pad(x_BTD, (0, 0, width - 1, 0)).transpose(1, 2)
    return torch.cat([state_BDW.transpose(1, 2).to(x_BTD.dtype), x_BTD], 1).transpose(1, 2)


def packed_with_past(
    x_BTD: Tensor, width: int, state_NDW: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed sequences, each behind the width - 1 inputs before it, as one of [1, D, S]: no shape asks where they begin.

    Returns with it where the outputs of the T tokens are, and the last width - 1 inputs of each sequence.
    """
    past, length, count = width - 1, x_BTD.shape[1], cu_seqlens.shape[0] - 1
    behind_W = torch.arange(past, device=x_BTD.device)
    time_T = torch.arange(length, device=x_BTD.device)
    bounds = cu_seqlens.long()
    number_T = torch.searchsorted(bounds, time_T, right=True) - 1
    place_T = time_T + number_T * past
    x_1SD = x_BTD.new_zeros(1, length + count * past, x_BTD.shape[2]).index_copy(1, place_T + past, x_BTD)
    number_N1 = torch.arange(count, device=x_BTD.device)[:, None]
    if state_NDW is not None:
        first_NW = bounds[:-1, None] + number_N1 * past + behind_W
        before = state_NDW.transpose(1, 2).flatten(0, 1)[None].to(x_BTD.dtype)
        x_1SD = x_1SD.index_copy(1, first_NW.flatten(), before)
    return x_1SD.transpose(1, 2), place_T, bounds[1:, None] + number_N1 * past + behind_W


def short_conv_step(
    x_BD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    activation: Literal["none", "silu"],
    state_BDW: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: (y_BD in the dtype of x, state [B, D, W-1]). The state that was given is left as it is.

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    check_conv(x_BD, weight_DW, bias_D, activation, state_BDW, is_step=True)
    x_BDW = torch.cat([state_BDW, x_BD[:, :, None].to(state_BDW.dtype)], 2)
    y_BD = (x_BDW * weight_DW).sum(2)
    if bias_D is not None:
        y_BD = y_BD + bias_D
    y_BD = F.silu(y_BD) if activation == "silu" else y_BD
    return y_BD.to(x_BD.dtype), x_BDW[:, :, 1:]


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": short_conv_reference,
    "torch": short_conv_torch,
}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of one backend; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("short_conv", "short_conv_triton")
        return found
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("short_conv", "short_conv_step_triton")
        return found
    return short_conv_step
