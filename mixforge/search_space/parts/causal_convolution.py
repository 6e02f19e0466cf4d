"""A causal convolution with holes or between all channels: y_t = sum_j W_j x_{t - (size - 1 - j) dilation}.

Source: van den Oord et al. 2016 (WaveNet, arXiv 1609.03499), section 2.1, for dilated causal convolutions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.short_convolution import ShortConvolution


class CausalConvolution(nn.Module):
    """Weights [D, 1, W], or [D, D, W] where it is dense. The state is a ring: token t is in slot t mod (W-1) dilation."""

    def __init__(self, channels: int, size: int, dilation: int, dense: bool) -> None:
        super().__init__()
        self.dilation = dilation
        inputs = channels if dense else 1
        bound = 1 / math.sqrt(inputs * size)
        self.weight = nn.Parameter(torch.empty(channels, inputs, size).uniform_(-bound, bound))

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The inputs that the next token looks back to [B, D, (W-1) dilation], which are zeros before the first."""
        channels, _, size = self.weight.shape
        return torch.zeros(batch, channels, (size - 1) * self.dilation, device=device, dtype=dtype)

    def forward(self, x_BTD: Tensor, ring_BDW: Tensor | None, at: Pass) -> Tensor:
        """A sequence. The ring is brought up to date in place."""
        channels, inputs, size = self.weight.shape
        reach = (size - 1) * self.dilation
        x_BDT = x_BTD.transpose(1, 2)
        if ring_BDW is None:
            seen_BDT = F.pad(x_BDT, (reach, 0))
        else:
            oldest_first = (at.start + torch.arange(reach, device=x_BTD.device)) % reach
            seen_BDT = torch.cat([ring_BDW[:, :, oldest_first], x_BDT], 2)
            kept = min(reach, x_BTD.shape[1])
            ring_BDW.index_copy_(2, at.positions_T[-kept:] % reach, x_BDT[:, :, -kept:])
        y_BDT = F.conv1d(seen_BDT, self.weight, dilation=self.dilation, groups=channels // inputs)
        return y_BDT.transpose(1, 2)

    def step(self, x_BD: Tensor, ring_BDW: Tensor, at: Pass) -> Tensor:
        """One token. The ring is brought up to date in place."""
        _, inputs, size = self.weight.shape
        reach = (size - 1) * self.dilation
        # The farthest tap reads the slot that this token takes.
        lags_W = torch.arange(size - 1, 0, -1, device=x_BD.device) * self.dilation
        past_BDW = ring_BDW[:, :, (at.positions_T - lags_W) % reach]
        seen_BDW = torch.cat([past_BDW, x_BD[:, :, None]], 2)
        ring_BDW.index_copy_(2, at.positions_T % reach, x_BD[:, :, None])
        if inputs == 1:
            return (seen_BDW * self.weight[:, 0]).sum(2)
        return F.linear(seen_BDW.flatten(1), self.weight.flatten(1))


Convolution = ShortConvolution | CausalConvolution


def convolve(
    conv: Convolution, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """A sequence through either of them, whose state is the only one of a layer."""
    past = None if state is None else state["conv"]
    # Asked for the usual one, so that a model that has it needs no word of the other.
    if not isinstance(conv, ShortConvolution):
        return conv(x_BTD, past, at), state
    y_BTD, after_BDW = conv(x_BTD, past)
    return y_BTD, None if state is None else {"conv": after_BDW}


def convolve_one(conv: Convolution, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> Tensor:
    """One token through either of them."""
    if not isinstance(conv, ShortConvolution):
        return conv.step(x_BD, state["conv"], at)
    return conv.step(x_BD, state["conv"])
