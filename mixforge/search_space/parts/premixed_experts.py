"""Attention that mixes its inputs and sends what it mixed through feed-forward experts: the module of `umoe`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixforge.kernels.attention import attend
from mixforge.search_space.parts.attention_pattern import EveryToken
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.experts import (
    Experts,
    ExpertWeights,
    StackedLinear,
    visit_gathered,
    visit_sorted,
)
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.rotary import rotate
from mixforge.search_space.parts.routing import AttachLoss, Router

_THETA = 10000.0


class PremixedExperts(TokenMixer):
    """[B, T, D] -> [B, T, D]. A cache of keys and inputs; its experts go along the pass, for layers that share them."""

    def __init__(
        self,
        width: int,
        head_dim: int,
        query_rank: int,
        count: int,
        pattern: EveryToken,
        router: Router,
        experts: Experts | None,
        shared: nn.Module | None,
        act: Callable[..., Tensor],
        gated: bool,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.pattern = pattern
        self.router = router
        self.experts = experts
        self.shared = shared
        self.act = act
        self.gated = gated
        # Queries of every expert, then those of the shared ones.
        self.query = Dense(width, head_dim * (1 if shared is None else 2), bias=False)
        self.query_down = StackedLinear(count, width, query_rank, False)
        self.query_up = StackedLinear(count, query_rank, head_dim, False)
        self.key = Dense(width, head_dim, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        channels = {"key": self.head_dim, "value": self.key.in_features}
        return {
            name: torch.zeros(batch, 1, capacity, count, device=device, dtype=dtype)
            for name, count in channels.items()
        }

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        weight_MA, index_MA, loss = self.router(x_BTD.flatten(0, 1))
        own_MAK = visit_sorted(x_BTD.flatten(0, 1), index_MA, self.query_weights(), unchanged, False)
        q_BHTK, entries = self.asked(x_BTD, own_MAK, at)
        if state is not None:
            entries = {name: self.pattern.extend(state[name], new, at.start) for name, new in entries.items()}
        m_BHTD = self.pattern.operation(q_BHTK, entries["key"], entries["value"], at.start)
        m_BTHD, chosen = m_BHTD.transpose(1, 2), index_MA.shape[1]
        visitors_ND = m_BTHD[:, :, :chosen].flatten(0, 2)
        y_N1D = visit_sorted(visitors_ND, index_MA.view(-1, 1), self.weights(at), self.act, self.gated)
        y_BTD = self.joined(y_N1D.view(*m_BTHD.shape[:2], chosen, -1), weight_MA, m_BTHD)
        if loss is not None:
            y_BTD = AttachLoss.apply(y_BTD, loss)  # type: ignore[no-untyped-call]
        return y_BTD, state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        weight_BA, index_BA, _ = self.router(x_BD)
        own_BAK = visit_gathered(x_BD, index_BA, self.query_weights(), unchanged, False)
        q_BHTK, entries = self.asked(x_BD[:, None], own_BAK, at)
        for name, new in entries.items():
            state[name].index_copy_(2, at.positions_T, new)
        seen = self.pattern.sees(at.positions_T, self.pattern.held(at.positions_T, state["key"].shape[2]))
        m_BHTD = attend(q_BHTK, state["key"], state["value"], seen)
        m_BTHD, chosen = m_BHTD.transpose(1, 2), index_BA.shape[1]
        visitors_ND = m_BTHD[:, 0, :chosen].flatten(0, 1)
        y_N1D = visit_gathered(visitors_ND, index_BA.view(-1, 1), self.weights(at), self.act, self.gated)
        return self.joined(y_N1D.view(len(x_BD), 1, chosen, -1), weight_BA, m_BTHD)[:, 0], state

    def query_weights(self) -> ExpertWeights:
        """The queries of low rank, as experts without an activation."""
        return ExpertWeights(self.query_down.weight, self.query_up.weight)

    def weights(self, at: Pass) -> ExpertWeights:
        """Its own experts, which later layers may read from here on, or those of the nearest owner below."""
        if self.experts is not None:
            at.shared["experts"] = self.experts.lent()
        return ExpertWeights(*at.shared["experts"])

    def asked(self, x_BTD: Tensor, own_MAK: Tensor, at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """Queries [B, H, T, K] of the picked experts and of the shared ones; the key and the input of each token."""
        every_BTHK = torch.unflatten(self.query(x_BTD), -1, (-1, self.head_dim))
        own_BTAK = own_MAK.view(*x_BTD.shape[:2], -1, self.head_dim)
        q_BTHK = torch.cat([every_BTHK[:, :, :1] + own_BTAK, every_BTHK[:, :, 1:]], 2)
        q, k = (rotate(each, at.positions_T, _THETA) for each in (q_BTHK, self.key(x_BTD)[:, :, None]))
        return q.transpose(1, 2), {"key": k.transpose(1, 2), "value": x_BTD[:, None]}

    def joined(self, y_BTAD: Tensor, weight_MA: Tensor, m_BTHD: Tensor) -> Tensor:
        """What the picked experts say by their weights, and what the shared ones say of what was mixed for them."""
        weight_BTA1 = weight_MA.view(*y_BTAD.shape[:3], 1)
        y_BTD: Tensor = (y_BTAD * weight_BTA1.to(y_BTAD.dtype)).sum(2)
        return y_BTD if self.shared is None else y_BTD + self.shared(m_BTHD[:, :, -1])


def unchanged(h: Tensor) -> Tensor:
    """What stands between the two matrices of a query of low rank."""
    return h
