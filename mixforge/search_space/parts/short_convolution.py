"""The module around the short causal convolution: its weights and its two forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over the last `size` tokens of each channel."""

    def __init__(
        self,
        channels: int,
        size: int,
        activation: Literal["none", "silu"],
        operation: Callable[..., tuple[Tensor, Tensor]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.operation = operation
        self.one_step = one_step
        self.weight = nn.Parameter(torch.empty(channels, size).uniform_(-1, 1) / math.sqrt(size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The last `size` - 1 inputs [B, D, W-1], which are zeros before the first token."""
        channels, size = self.weight.shape
        return torch.zeros(batch, channels, size - 1, device=device, dtype=dtype)

    def forward(self, x_BTD: Tensor, state_BDW: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.operation(x_BTD, self.weight, self.bias, self.activation, state_BDW)

    def step(self, x_BD: Tensor, state_BDW: Tensor) -> Tensor:
        """One token. The state is brought up to date in place."""
        y_BD, after_BDW = self.one_step(x_BD, self.weight, self.bias, self.activation, state_BDW)
        if after_BDW is not state_BDW:
            state_BDW.copy_(after_BDW)
        return y_BD
