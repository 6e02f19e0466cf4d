"""The weights of the levels of a log-linear state: softplus(l_he (W x)_he) for head h and level e.

Source: Guo et al. 2025 (arXiv 2506.04761), section 3.3, and fla's layer. Departure: a model has weights for LEVELS
levels, of which the last also weighs all above.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import split_heads

# Enough for 32768 tokens.
LEVELS = 16


class LevelWeights(nn.Module):
    """[B, T, D] -> [B, T, H, LEVELS]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.logit = Dense(width, heads * LEVELS, bias=False)
        self.scale = nn.Parameter(torch.ones(heads, LEVELS))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.softplus(exact(self.scale) * split_heads(exact(self.logit(x_BTD)), self.heads))
