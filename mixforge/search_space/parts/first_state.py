"""What the state of a recurrence is before the first token, where it is not zero.

    learned   S_0 a weight, in training and after it
    noise     S_0 ~ N(0, sd^2) in training
    carry     in training the state after the last sequence of the batch before, without its gradient

The last two let a model meet states that its sequences do not lead to from zero. After training they start from zero.

Sources: Young 2026 (arXiv 2604.01168) for a learned one; Buitrago and Gu 2025 (arXiv 2507.02782), random noise and
state passing, for the others. Departure: all sequences of a batch start from one state of the batch before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FirstState(nn.Module):
    """A learned state, [H, K, V]; what stands beside the values starts at 0."""

    def __init__(self, heads: int, features: int, value_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, features, value_dim))

    def forward(self, batch: int, columns: int) -> Tensor:
        padded = F.pad(self.weight, (0, columns - self.weight.shape[-1]))
        return padded.expand(batch, *padded.shape)


class NoisyState(nn.Module):
    """From torch's global generator; what stands beside the values starts at 0."""

    def __init__(self, heads: int, features: int, columns: int, value_dim: int, deviation: float) -> None:
        super().__init__()
        self.shape = (heads, features, columns)
        self.value_dim = value_dim
        self.deviation = deviation

    def forward(self, batch: int, device: torch.device) -> Tensor:
        matrix = self.deviation * torch.randn(batch, *self.shape, device=device)
        matrix[..., self.value_dim :] = 0
        return matrix

    def keep(self, matrix_BHKV: Tensor) -> None:
        """What a training sequence ends with is of no use."""


class CarriedState(nn.Module):
    """The state after the last sequence of the batch before, which a checkpoint has as well."""

    matrix: Tensor

    def __init__(self, heads: int, features: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.zeros(heads, features, columns))

    def forward(self, batch: int, device: torch.device) -> Tensor:
        return self.matrix.expand(batch, -1, -1, -1)

    def keep(self, matrix_BHKV: Tensor) -> None:
        # A tensor of its own, as the backward pass needs the one before.
        self.matrix = matrix_BHKV[-1].detach().to(self.matrix.dtype, copy=True)
