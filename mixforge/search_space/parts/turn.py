"""Queries and keys doubled by an angle, x -> (x cos a, x sin a), so that q_c k_c becomes q_c k_c cos(a_t - a_s).

    lrpe      a = t theta_hc, theta learned from 10000^(-i/n), i of all n channels: Qin et al. 2023 (arXiv 2307.14995),
              the cosine form of Qin et al. 2023 (arXiv 2307.09270)
    phase     a = the sum of W x_s for s <= t, one angle for each channel: with a decay, the complex decay
              |a_t| e^{i W x_t} of Katsch 2023 (arXiv 2311.01927), whose real part this is
    cosine(M) a = pi t / (2M) for every channel: Qin et al. 2022 (arXiv 2202.08791)

A turned product needs no complex numbers: the state has 2K rows in place of K complex ones, and the decay is real.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import split_heads


def turned(x_BTHK: Tensor, angle: Tensor) -> Tensor:
    """(x cos a, x sin a) [B, T, H, 2K] for angles that broadcast to [B, T, H, K]."""
    return torch.cat([x_BTHK * angle.cos().to(x_BTHK.dtype), x_BTHK * angle.sin().to(x_BTHK.dtype)], -1)


class Turn(nn.Module):
    """Angles that broadcast to [B, T, H, K], and the state after them where there is one. Abstract."""

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """The state before the first token; None where angles follow from the position."""
        return None

    def forward(
        self, x_BTD: Tensor, positions_T: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class LearnedTurn(Turn):
    """a = t theta [T, H, K], theta a weight for each head and channel."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        index = torch.arange(heads * channels, dtype=torch.float32)
        theta = torch.exp(index * (-math.log(10000.0) / (heads * channels)))
        self.theta = nn.Parameter(theta.view(heads, channels))

    def forward(
        self, x_BTD: Tensor, positions_T: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        theta_HK = exact(self.theta)
        return positions_T.to(theta_HK.dtype)[:, None, None] * theta_HK, None


class FixedTurn(Turn):
    """a = pi t / (2M) [T, 1, 1]."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(
        self, x_BTD: Tensor, positions_T: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return positions_T.to(exact(x_BTD).dtype)[:, None, None] * (math.pi / 2 / self.most), None


class PhaseTurn(Turn):
    """a = the sum of W x over the tokens so far [B, T, H, K], up to whole turns. Its state is the last sum."""

    def __init__(self, width: int, heads: int, channels: int) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        self.angle = Dense(width, heads * channels, bias=False)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        return torch.zeros(batch, self.heads, self.channels, device=device, dtype=dtype)

    def forward(
        self, x_BTD: Tensor, positions_T: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        # In float64, for a float32 sum of some ten thousand angles is off by a hundredth of a turn.
        sums = split_heads(self.angle(x_BTD).double().cumsum(1), self.heads)
        if before is not None:
            sums = sums + before[:, None].double()
        sums = torch.remainder(sums, 2 * math.pi).to(exact(x_BTD).dtype)
        return sums, sums[:, -1]
