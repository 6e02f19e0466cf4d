"""Short causal depthwise convolution y_t = act(bias + sum_j w_j x_{t-W+1+j}), j = 0 .. W-1, W from 2 to 8.

Source: Gu and Dao 2023 (arXiv 2312.00752, section 3.4), the convolution in front of the selective scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv_reference(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    activation: Literal["none", "silu"] = "none",
    state_BDW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A sum of shifted inputs.

    `state_BDW` [B, D, W-1] holds the inputs before the first token, oldest first; None is zeros. Returns y_BTD and
    the state after the last token, both in the dtype of x.
    """
    width, length = weight_DW.shape[1], x_BTD.shape[1]
    x_BDT = with_past(x_BTD, width, state_BDW)
    y_BDT = torch.zeros_like(x_BDT[:, :, :length])
    for tap in range(width):
        y_BDT = y_BDT + weight_DW[:, tap, None] * x_BDT[:, :, tap : tap + length]
    if bias_D is not None:
        y_BDT = y_BDT + bias_D[:, None]
    y_BDT = F.silu(y_BDT) if activation == "silu" else y_BDT
    return y_BDT.transpose(1, 2), x_BDT[:, :, length:].clone()


def short_conv_torch(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    activation: Literal["none", "silu"] = "none",
    state_BDW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `short_conv_reference`, by torch's depthwise convolution: 2 W D matmul FLOPs a token."""
    width, length = weight_DW.shape[1], x_BTD.shape[1]
    x_BDT = with_past(x_BTD, width, state_BDW)
    y_BDT = F.conv1d(x_BDT, weight_DW[:, None], bias_D, groups=weight_DW.shape[0])
    y_BDT = F.silu(y_BDT) if activation == "silu" else y_BDT
    return y_BDT.transpose(1, 2), x_BDT[:, :, length:].clone()


def with_past(x_BTD: Tensor, width: int, state_BDW: Tensor | None) -> Tensor:
    """The inputs, channels before time, behind the width - 1 inputs that came before."""
    x_BDT = x_BTD.transpose(1, 2)
    if state_BDW is None:
        return F.pad(x_BDT, (width - 1, 0))
    return torch.cat([state_BDW.to(x_BTD.dtype), x_BDT], 2)


def short_conv_step(
    x_BD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    activation: Literal["none", "silu"],
    state_BDW: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: (y_BD, state [B, D, W-1]). The state that was given is left as it is."""
    x_BDW = torch.cat([state_BDW, x_BD[:, :, None].to(state_BDW.dtype)], 2)
    y_BD = (x_BDW * weight_DW).sum(2)
    if bias_D is not None:
        y_BD = y_BD + bias_D
    y_BD = F.silu(y_BD) if activation == "silu" else y_BD
    return y_BD, x_BDW[:, :, 1:]


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": short_conv_reference,
    "torch": short_conv_torch,
}
