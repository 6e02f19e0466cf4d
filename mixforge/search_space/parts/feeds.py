"""What a gated attention unit reads in the place of its input: silu of a scan, or dilated convolutions.

    scan           x' = silu(scan(x)), of a fixed state space or of moving averages
    convolutions   c^0 = x,  c^{i+1} = c^i + silu(conv_i(c^i)),  x' the last of them; conv_i with holes of r^i tokens

Sources: see `mixers.gau`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.causal_convolution import CausalConvolution
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.state_space import StateSpace


class ScanFeed(TokenMixer):
    """[B, T, D] -> [B, T, D]."""

    def __init__(self, scan: StateSpace) -> None:
        super().__init__()
        self.scan = scan

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.scan.initial_state(batch, device, dtype)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        y_BTD, _, after = self.scan(x_BTD, state)
        return F.silu(y_BTD), None if state is None else after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        return F.silu(self.scan.step(x_BD, state)[0]), state


class ConvolutionFeed(TokenMixer):
    """[B, T, D] -> [B, T, D]. The state has a ring for each convolution."""

    def __init__(self, width: int, size: int, dilation: int, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            CausalConvolution(width, size, dilation**number, dense=False) for number in range(layers)
        )

    def conv(self, number: int) -> CausalConvolution:
        conv = self.convs[number]
        assert isinstance(conv, CausalConvolution)
        return conv

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        numbers = range(len(self.convs))
        return {f"conv{number}": self.conv(number).initial_state(batch, device, dtype) for number in numbers}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        for number in range(len(self.convs)):
            ring_BDW = None if state is None else state[f"conv{number}"]
            x_BTD = x_BTD + F.silu(self.conv(number)(x_BTD, ring_BDW, at))
        return x_BTD, state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        for number in range(len(self.convs)):
            x_BD = x_BD + F.silu(self.conv(number).step(x_BD, state[f"conv{number}"], at))
        return x_BD, state
