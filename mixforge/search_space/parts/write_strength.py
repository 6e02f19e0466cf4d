"""The write strength of the delta rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact


class WriteStrength(nn.Module):
    """beta_t = most * sigmoid(W x) [B, T, H]."""

    def __init__(self, width: int, heads: int, most: int) -> None:
        super().__init__()
        self.most = most
        self.logit = nn.Linear(width, heads, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.most * torch.sigmoid(exact(self.logit(x_BTD)))
