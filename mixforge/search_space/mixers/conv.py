"""Gated short convolution: y = W_out (c * conv(b * v)), with b, c and v projections of x.

Source: Fu et al. 2022 (arXiv 2212.14052), figure 1 (the shift and the multiplicative gates of H3); in this
form the short-range layer of LFM2 (Liquid AI 2025, arXiv 2511.23404). Departures: no biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from mixforge.kernels import short_conv
from mixforge.search_space.genes import Whole
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.short_convolution import ShortConvolution


@dataclass(frozen=True, slots=True)
class Conv(Mixer):
    """Gated short convolution. Gene: how many tokens the convolution sees, its own included."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    size: Annotated[int, Whole(2, 8)] = 3

    def why_illegal(self, width: int) -> str | None:
        return None

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        params = 4 * width * width + width * self.size
        state = width * (self.size - 1) * itemsize
        return Cost(
            params=params,
            flops=2 * length * params,
            state_bytes=state,
            decode_bytes=params * itemsize + 2 * state,
        )

    def build(self, width: int, backend: Backend) -> Part:
        conv = Part(
            ShortConvolution,
            channels=width,
            size=self.size,
            activation="none",
            operation=short_conv.form(backend),
            one_step=short_conv.step_form(backend),
        )
        return Part(GatedConvolution, width=width, conv=conv)


class GatedConvolution(TokenMixer):
    """[B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, conv: ShortConvolution) -> None:
        super().__init__()
        self.mixed = nn.Linear(width, 3 * width, bias=False)
        self.conv = conv
        self.out = nn.Linear(width, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"conv": self.conv.initial_state(batch, device, dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        into_BTD, out_of_BTD, v_BTD = self.mixed(x_BTD).chunk(3, -1)
        y_BTD, after_BDW = self.conv(into_BTD * v_BTD, None if state is None else state["conv"])
        return self.out(out_of_BTD * y_BTD), None if state is None else {"conv": after_BDW}

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        into_BD, out_of_BD, v_BD = self.mixed(x_BD).chunk(3, -1)
        return self.out(out_of_BD * self.conv.step(into_BD * v_BD, state["conv"])), state
