"""Feature maps of queries and keys, elementwise or over the channels of a head.

elu1      elu(x) + 1: Katharopoulos et al. 2020 (arXiv 2006.16236), equation 7
taylor    phi(q) . phi(k) = 1 + q.k/sqrt(K) + (q.k)^2/(2K): Arora et al. 2024 (arXiv 2402.18668)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def taylor_features(key_dim: int) -> int:
    """Features of phi=taylor(2): the constant, the channels, and their products, each pair once."""
    return 1 + key_dim + key_dim * (key_dim + 1) // 2


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1, which is positive."""
    return F.elu(x) + 1


def taylor(x: Tensor) -> Tensor:
    """[..., K] -> [..., 1 + K + K(K+1)/2], with taylor(q) . taylor(k) = 1 + q.k/sqrt(K) + (q.k)^2/(2K)."""
    channels = x.shape[-1]
    row, column = torch.triu_indices(channels, channels, device=x.device)
    # A product of two channels stands for the two equal terms of (q.k)^2; a square for one.
    terms = (2 - (row == column).to(x.dtype)) / (2 * channels)
    pairs = x[..., row] * x[..., column] * terms.sqrt()
    return torch.cat([torch.ones_like(x[..., :1]), x * channels**-0.25, pairs], -1)
