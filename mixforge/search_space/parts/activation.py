"""Elementwise activations as top-level functions, so that a `Part` can name them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x). Source: Elfwing et al. 2017 (arXiv 1702.03118)."""
    return F.silu(x)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), exact. Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415)."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, which is nearly gelu. Source: Hendrycks and Gimpel 2016 (arXiv
    1606.08415), section 2.
    """
    return F.gelu(x, approximate="tanh")


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


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up. Source: Shazeer 2020 (arXiv 2002.05202), equation 6."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) up. Source: Shazeer 2020 (arXiv 2002.05202), equation 6."""
    return F.gelu(gate) * up


def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) up, the form of Gemma (Gemma Team 2024, arXiv 2403.08295)."""
    return F.gelu(gate, approximate="tanh") * up


def sigmoid_glu(gate: Tensor, up: Tensor) -> Tensor:
    """sigmoid(gate) up. Source: Dauphin et al. 2016 (arXiv 1612.08083), equation 1."""
    return torch.sigmoid(gate) * up


def bilinear(gate: Tensor, up: Tensor) -> Tensor:
    """gate up. Source: Shazeer 2020 (arXiv 2002.05202), equation 5."""
    return gate * up


class ClampedSwiglu(nn.Module):
    """g sigmoid(1.702 g) (u + 1), g the gate cut off above `limit` and u the other half cut off beyond +-`limit`.

    Source: OpenAI 2025 (arXiv 2508.10925), section 2.3, with the numbers of its public code (limit 7).
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-self.limit, self.limit) + 1)
