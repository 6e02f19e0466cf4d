"""What every kind of attention does around its keys and values: queries in, gate and output projection out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.attention_position import turned
from mixforge.search_space.parts.layer import split_heads


class Queries(nn.Module):
    """Queries [B, H, T, K]: projected, normalised, turned."""

    def __init__(self, heads: int, query: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.heads = heads
        self.query = query
        self.norm = norm

    def forward(self, x_BTD: Tensor, angle: Tensor | None) -> Tensor:
        q_BTHK = split_heads(self.query(x_BTD), self.heads)
        if self.norm is not None:
            q_BTHK = self.norm(q_BTHK)
        return turned(q_BTHK, angle).transpose(1, 2)


class Output(nn.Module):
    """The heads' outputs [B, H, T, V] gated and projected: o * sigmoid(W_g x), then W_o."""

    def __init__(self, width: int, channels: int, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, channels, bias=False) if gated else None
        self.out = nn.Linear(channels, width, bias=False)

    def forward(self, o_BHTV: Tensor, x_BTD: Tensor) -> Tensor:
        o_BTF = o_BHTV.transpose(1, 2).flatten(2)
        if self.gate is not None:
            o_BTF = o_BTF * torch.sigmoid(self.gate(x_BTD))
        y: Tensor = self.out(o_BTF)
        return y
