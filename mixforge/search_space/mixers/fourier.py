"""Causal Fourier mixing, without weights: a discrete Fourier transform over channels and one over the tokens so far.

    y_t = Re sum_{t-W < s <= t} exp(-2 pi i (t mod W)(s mod W) / W) F(x_s) / sqrt(W)

F is the discrete Fourier transform over channels, divided by the root of the width.

Source: Lee-Thorp et al. 2021 (FNet, arXiv 2105.03824), equations 1 and 3: y = Re(F_seq(F_hidden(x))), which sees the
whole sequence. Departures: the transform over time has a fixed length W and only the entries that look back, so that a
token sees the last W tokens; both transforms are unitary, as no norm follows directly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from mixforge.search_space.genes import Whole
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.banded import banded_flops, mix_banded
from mixforge.search_space.parts.layer import Pass, TokenMixer


@dataclass(frozen=True, slots=True)
class Fourier(Mixer):
    """Causal Fourier mixing. Gene: the length of the transform over time, and so the tokens that it sees."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    window: Annotated[int, Whole(2, 4096)] = 64

    def why_illegal(self, width: int) -> str | None:
        return None

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        slot = width * itemsize
        kept = min(length, self.window) * slot
        return Cost(
            params=0,
            # A cosine and a sine; the transform over channels is fast and has no matrix product.
            flops=2 * banded_flops(length, self.window) * width,
            state_bytes=kept,
            decode_bytes=kept + slot,
        )

    def build(self, width: int, backend: Backend) -> Part:
        return Part(FourierMixing, width=width, window=self.window)


class FourierMixing(TokenMixer):
    """[B, T, D] -> [B, T, D]. The state is a ring of the last `window` inputs: token t is in slot t mod W."""

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.width = width
        self.window = window

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {
            "input": torch.zeros(batch, min(self.window, capacity), self.width, device=device, dtype=dtype)
        }

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        # Two heads that read the same channels: one mixes with cosines, the other with sines.
        matrix_HWW = self._waves(torch.arange(self.window, device=x_BTD.device), x_BTD.dtype)
        x_BHTD = x_BTD[:, None].expand(-1, 2, -1, -1)
        ring_BHWD = None if state is None else state["input"][:, None].expand(-1, 2, -1, -1)
        y_BHTD = mix_banded(matrix_HWW, matrix_HWW, x_BHTD, ring_BHWD, at.start)
        if state is not None:
            slots = state["input"].shape[1]
            kept = min(slots, x_BTD.shape[1])
            state["input"].index_copy_(1, at.positions_T[-kept:] % slots, x_BTD[:, -kept:])
        return real_transform(y_BHTD[:, 0], y_BHTD[:, 1]), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        slots = state["input"].shape[1]
        state["input"].index_copy_(1, at.positions_T % slots, x_BD[:, None])
        seen_W = torch.arange(slots, device=x_BD.device) <= at.positions_T
        row_HW = self._waves(at.positions_T % self.window, x_BD.dtype)[:, 0, :slots] * seen_W
        y_BHD = (row_HW[:, :, None] * state["input"][:, None]).sum(2)
        return real_transform(y_BHD[:, 0], y_BHD[:, 1]), state

    def _waves(self, rows_T: Tensor, dtype: torch.dtype) -> Tensor:
        """cos and sin of 2 pi t s / W, over sqrt(W): [2, T, W]."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        # Whole turns are taken off before the product loses digits.
        turns = rows_T[:, None] * torch.arange(self.window, device=rows_T.device) % self.window
        angle_TW = turns.to(exact) * (2 * math.pi / self.window)
        return (torch.stack([angle_TW.cos(), angle_TW.sin()]) / math.sqrt(self.window)).to(dtype)


def real_transform(cosine: Tensor, sine: Tensor) -> Tensor:
    """Re F(cosine - i sine), F over the last axis, unitary. Half precision is transformed in float32."""
    exact = torch.float64 if cosine.dtype == torch.float64 else torch.float32
    both = torch.complex(cosine.to(exact), -sine.to(exact))
    real: Tensor = torch.fft.fft(both, norm="ortho").real
    return real.to(cosine.dtype)
