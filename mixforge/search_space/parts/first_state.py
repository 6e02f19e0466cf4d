"""What the state of a recurrence is before the first token, where it is not zero.

    learned   S_0 a weight, in training and after it
    noise     S_0 ~ N(0, sd^2) in training
    carry     in training the state after the last sequence of the batch before, without its gradient
    prefix    S_0 = sum over j < n of phi(k'_j) v'_j^T, k' = W'_k x and v' = W'_v x: what the first n tokens write
              together, with projections of their own

Noise and carry let a model meet states that its sequences do not lead to from zero. After training they start from zero.
With a prefix the recurrence then goes over all tokens, those of the prefix included, from S_0 on; the normaliser's sum
starts with that of phi(k'_j). Keys k' are turned, mapped and normed as the others are, and have no convolution, no
activation before the feature map, no gate and no decay, nor have the values.

Sources: Young 2026 (arXiv 2604.01168) for a learned one; Buitrago and Gu 2025 (arXiv 2507.02782), random noise and
state passing, for noise and carry; Arora et al. 2024 (arXiv 2407.05483), section 4.2, for a prefix, with the feature map
and the queries of both sums the same, as in its public code (`based/models/mixers/prefix_linear_attention.py`).
Departures: all sequences of a batch start from one state of the batch before; a prefix stands before any rule and decay,
where in the paper sums are added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense


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


class PrefixState(nn.Module):
    """Keys and values [B, n, F] of the first `length` tokens, or of as many as there are."""

    def __init__(self, width: int, length: int, keys: int, values: int) -> None:
        super().__init__()
        self.length = length
        self.key = Dense(width, keys, bias=False)
        self.value = Dense(width, values, bias=False)

    def forward(self, k_BTD: Tensor, v_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.key(k_BTD[:, : self.length]), self.value(v_BTD[:, : self.length])


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
