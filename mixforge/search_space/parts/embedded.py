"""A token mixer that reads each token's embedding beside the residual stream: f(norm([x; e])).

e is what enters the first layer. The two are normed together, so that no norm of the residual unit stands before them.

Source: Glorioso et al. 2024 (arXiv 2405.16712), figure 2, of Zamba's shared block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.layer import Pass, TokenMixer


class Embedded(TokenMixer):
    """[B, T, D] and the embeddings [B, T, D] of the pass -> [B, T, D]; the inner mixer reads [B, T, 2 D]."""

    def __init__(self, norm: nn.Module, inner: TokenMixer) -> None:
        super().__init__()
        self.norm = norm
        self.inner = inner

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.inner.initial_state(batch, capacity, device, dtype)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        y_BTD: Tensor
        y_BTD, after = self.inner(self.norm(torch.cat([x_BTD, at.shared["embedding"][0]], -1)), state, at)
        return y_BTD, after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        both_BF = torch.cat([x_BD, at.shared["embedding"][0][:, 0]], -1)
        return self.inner.step(self.norm(both_BF), state, at)

    def between(self, state: dict[str, Tensor], length: int) -> None:
        self.inner.between(state, length)
