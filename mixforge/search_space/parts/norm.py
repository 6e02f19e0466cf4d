"""The modules around the root-mean-square normalisation, with a weight and without.

    rms       x / sqrt(mean(x^2) + eps) * w
    simple    x / sqrt(mean(x^2) + eps)

Sources: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4; Qin et al. 2023 (arXiv 2307.14995), equation 8,
for `simple`, with eps under the root and not as a floor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from mixforge.kernels import norm
from mixforge.search_space.mixer import Backend
from mixforge.search_space.part import Part


class RMSNorm(nn.Module):
    """Over the last axis, of size `width`; computed in float32 or better."""

    def __init__(self, width: int, operation: Callable[..., Tensor], eps: float = 1e-6) -> None:
        super().__init__()
        self.operation = operation
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.weight, self.eps)


class SimpleRMSNorm(nn.Module):
    """Over the last axis, without a weight; computed in float32 or better."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype.itemsize >= 4 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@lru_cache(maxsize=4_096)
def norm_part(width: int, backend: Backend) -> Part:
    """The module with the operation of a backend."""
    return Part(RMSNorm, width=width, operation=norm.form(backend))
