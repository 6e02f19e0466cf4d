"""What each projection reads of a token and the one before it.

lerp      x + mu_i (x_{t-1} - x) for projection i: Peng et al. 2023 (arXiv 2305.13048)
lowrank   x + (lambda_i + tanh((x + mu (x_{t-1} - x)) A_i) B_i) (x_{t-1} - x), A and B of rank 32: Peng et al. 2024
          (arXiv 2404.05892)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense

SHIFT_RANK = 32


class TokenShift(nn.Module):
    """Input [B, T, D] -> one input for each of `count` projections [count, B, T, D]."""

    def __init__(self, width: int, count: int, lowrank: bool) -> None:
        super().__init__()
        self.count = count
        # Shares of the last token between 0 and 1, another for each channel, as in Peng et al. 2024.
        share = 1 - torch.arange(width, dtype=torch.float32) / width
        self.share = nn.Parameter(share.repeat(count, 1))
        self.lowrank = LowRankShare(width, count) if lowrank else None

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The last input [B, D], which is zeros before the first token."""
        return torch.zeros(batch, self.share.shape[1], device=device, dtype=dtype)

    def forward(self, x_BTD: Tensor, before_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        first = torch.zeros_like(x_BTD[:, 0]) if before_BD is None else before_BD
        back_BTD = torch.cat([first[:, None], x_BTD[:, :-1]], 1) - x_BTD
        share = self.share[:, None, None]
        if self.lowrank is not None:
            share = share + self.lowrank(x_BTD, back_BTD)
        return x_BTD + share * back_BTD, x_BTD[:, -1]


class LowRankShare(nn.Module):
    """tanh((x + mu d) A_i) B_i [count, B, T, D], d the way back to the last token."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((width,), 0.5))
        self.down = Dense(width, count * SHIFT_RANK, bias=False)
        self.up = nn.Parameter(torch.empty(count, SHIFT_RANK, width).uniform_(-0.01, 0.01))

    def forward(self, x_BTD: Tensor, back_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        rank = torch.tanh(self.down(x_BTD + self.share * back_BTD))
        rank = rank.view(batch * length, -1, SHIFT_RANK).transpose(0, 1)
        return (rank @ self.up).view(-1, batch, length, width)
