"""Elementwise activations as top-level functions, so that a `Part` can name them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x). Source: Elfwing et al. 2017 (arXiv 1702.03118)."""
    return F.silu(x)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), exact. Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415)."""
    return F.gelu(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return torch.sigmoid(x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return F.relu(x)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2. Source: So et al. 2021 (arXiv 2109.08668)."""
    return F.relu(x).square()


def identity(x: Tensor) -> Tensor:
    """x."""
    return x
