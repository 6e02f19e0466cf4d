"""What rule=dplr removes, and what it writes in its place.

    a_t = most sigmoid(W_2 W_1 x + b)          in-context learning rate of each key channel
    kappa_t = xi k_t / |xi k_t|                removal key
    k_t <- k_t (1 + alpha (a_t - 1))           replacement key

Source: Peng et al. 2025 (arXiv 2503.14456), section 4, and fla's layer for where the weights start. Departure: they
start the same in every layer and, but for b, in every channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import split_heads

RATE_RANK = 64


class RemovalKeys(nn.Module):
    """Keys [B, T, H, K] -> replacement keys, and kappa and a kappa [B, T, H, 2, K]."""

    def __init__(self, width: int, heads: int, features: int, most: int) -> None:
        super().__init__()
        self.heads = heads
        self.most = most
        self.down = Dense(width, RATE_RANK, bias=False)
        self.up = Dense(RATE_RANK, heads * features)
        self.removed = nn.Parameter(torch.full((heads, features), 0.71))
        self.replaced = nn.Parameter(torch.full((heads, features), 1.02))
        with torch.no_grad():
            self.up.bias.copy_(torch.linspace(-0.39, 0.01, heads * features))

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        rate_BTHK = self.most * torch.sigmoid(split_heads(exact(self.up(self.down(x_BTD))), self.heads))
        kappa_BTHK = F.normalize(exact(k_BTHK) * self.removed, dim=-1, eps=1e-6)
        removal = torch.stack([kappa_BTHK, rate_BTHK * kappa_BTHK], -2)
        share_BTHK = 1 + self.replaced * (rate_BTHK - 1)
        return k_BTHK * share_BTHK.to(k_BTHK.dtype), removal
