"""Attention whose heads are experts: a router picks some for each token, over one head of keys and values.

    p = softmax(W_r x), G the k largest        y = sum_{i in G} p_i / sum_{j in G} p_j  W_o,i attention(W_q,i x)

Source: Zhang et al. 2022 (arXiv 2210.05144), equations 3 to 8.

Departures: the weights' sum in the denominator is part of the derivative; the balancing loss is that of `routing`, and
there is none on the size of the router's logits. Queries of all experts are made and those that were picked are taken,
which costs products of every expert, and attention itself of the picked ones alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.routing import AttachLoss, Router


@dataclass
class Route:
    """Which experts each token takes [B, T, A], with what weights [B, T, A], and the balancing loss."""

    index_BTA: Tensor
    weight_BTA: Tensor
    loss: Tensor | None


class Routing(nn.Module):
    """A router over the tokens of a pass."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_BTD: Tensor) -> Route:
        weight_MA, index_MA, loss = self.router(x_BTD.flatten(0, 1))
        shape = (*x_BTD.shape[:2], -1)
        return Route(index_MA.view(shape), weight_MA.view(shape).to(x_BTD.dtype), loss)


class ExpertQueries(nn.Module):
    """[B, T, D] -> the picked experts' queries [B, T, A * K]."""

    def __init__(self, width: int, experts: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.every = Dense(width, experts * head_dim, bias=False)

    def forward(self, x_BTD: Tensor, route: Route) -> Tensor:
        every_BTEK = torch.unflatten(self.every(x_BTD), -1, (-1, self.head_dim))
        index_BTAK = route.index_BTA[..., None].expand(-1, -1, -1, self.head_dim)
        return every_BTEK.gather(2, index_BTAK).flatten(2)


class ExpertOutputs(nn.Module):
    """The picked experts' outputs [B, T, A * V], weighed and projected by their own matrices: [B, T, D]."""

    def __init__(self, width: int, experts: int, head_dim: int) -> None:
        super().__init__()
        self.experts = experts
        self.head_dim = head_dim
        self.out = Dense(experts * head_dim, width, bias=False)

    def forward(self, o_BTF: Tensor, route: Route) -> Tensor:
        o_BTAV = torch.unflatten(o_BTF, -1, (-1, self.head_dim)) * route.weight_BTA[..., None]
        batch, length, _, _ = o_BTAV.shape
        none_BTEV = o_BTAV.new_zeros(batch, length, self.experts, self.head_dim)
        every_BTEV = none_BTEV.scatter(2, route.index_BTA[..., None].expand_as(o_BTAV), o_BTAV)
        y: Tensor = self.out(every_BTEV.flatten(2))
        if route.loss is not None:
            y = AttachLoss.apply(y, route.loss)  # type: ignore[no-untyped-call]
        return y
