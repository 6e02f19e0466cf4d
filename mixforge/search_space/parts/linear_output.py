"""What follows the recurrence of the linear family: skip, norm, gate and output projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class HeadSkip(nn.Module):
    """d_h v_t, d_h starting at 1."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads))

    def forward(self, v_BTHV: Tensor) -> Tensor:
        return self.weight[:, None] * v_BTHV


class NormedOutput(nn.Module):
    """W_out (norm(o_h) * act(W_gate x)), the norm over each head."""

    def __init__(
        self,
        width: int,
        heads: int,
        value_dim: int,
        norm: nn.Module | None,
        activation: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation
        self.gate = None if activation is None else nn.Linear(width, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, width, bias=False)

    def forward(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        if self.norm is not None:
            o_BTHV = self.norm(o_BTHV)
        o_BTF = o_BTHV.flatten(2)
        if self.activation is not None and self.gate is not None:
            o_BTF = o_BTF * self.activation(self.gate(x_BTD))
        y: Tensor = self.out(o_BTF)
        return y


class GatedOutput(nn.Module):
    """W_out norm(o * act(W_gate x)), the norm over all heads at once."""

    def __init__(
        self,
        width: int,
        heads: int,
        value_dim: int,
        norm: nn.Module,
        activation: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation
        self.gate = None if activation is None else nn.Linear(width, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, width, bias=False)

    def forward(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        o_BTF = o_BTHV.flatten(2)
        if self.activation is not None and self.gate is not None:
            o_BTF = o_BTF * self.activation(self.gate(x_BTD))
        y: Tensor = self.out(self.norm(o_BTF))
        return y
