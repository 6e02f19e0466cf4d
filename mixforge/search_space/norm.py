"""The module around the root-mean-square normalisation: its weight.

Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.kernels.norm import RootMeanSquare


class RMSNorm(nn.Module):
    """Over the last axis, of size `width`; computed in float32 or better."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        y: Tensor = RootMeanSquare.apply(wide, self.weight.to(wide.dtype), self.eps)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)
