"""Attention whose query is learned and the same for all tokens: a recurrence with a state of V + 2 numbers a head.

    z_t = q_h . k_t / sqrt(K)        o_t = sum_{s <= t} softmax_s(z_s) v_s

Source: Feng et al. 2024 (arXiv 2405.13956), section 3.3; `softmax_scan` for the scan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixforge.kernels.softmax_scan import START, Carry
from mixforge.search_space.parts.attention_heads import Output
from mixforge.search_space.parts.attention_memory import Memory
from mixforge.search_space.parts.layer import Pass, TokenMixer


class LearnedQuery(TokenMixer):
    """One query for each head, over keys and values of as many or fewer heads."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        memory: Memory,
        output: Output,
        operation: Callable[[Tensor, Tensor, Carry | None], tuple[Tensor, Carry]],
        one_step: Callable[[Tensor, Tensor, Carry], Tensor],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.memory = memory
        self.output = output
        self.operation = operation
        self.one_step = one_step
        self.query = nn.Parameter(torch.randn(heads, head_dim))

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            "top": torch.full((batch, self.heads), START, device=device, dtype=exact),
            "weight": torch.zeros(batch, self.heads, device=device, dtype=exact),
            "sum": torch.zeros(batch, self.heads, self.head_dim, device=device, dtype=exact),
            **self.memory.initial_state(batch, device, dtype),
        }

    def scored(self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass) -> tuple[Tensor, Tensor]:
        """Scores [B, H, T] and values [B, H, T, V] of the tokens of a pass."""
        entries = self.memory.entries(x_BTD, None, state, at)
        k_BHTK, v_BHTV = entries["key"], entries["value"]
        group = self.heads // k_BHTK.shape[1]
        q_HGK = torch.unflatten(self.query * self.head_dim**-0.5, 0, (-1, group))
        z_BHT = (k_BHTK @ q_HGK.transpose(1, 2)).transpose(2, 3).flatten(1, 2)
        return z_BHT, v_BHTV.repeat_interleave(group, 1)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        carry = None if state is None else (state["top"], state["weight"], state["sum"])
        z_BHT, v_BHTV = self.scored(x_BTD, state, at)
        o_BHTV, after = self.operation(z_BHT, v_BHTV, carry)
        if carry is not None:
            for old, new in zip(carry, after, strict=True):
                old.copy_(new)
        return self.output(o_BHTV, x_BTD), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        x_BTD = x_BD[:, None]
        z_BHT, v_BHTV = self.scored(x_BTD, state, at)
        carry = (state["top"], state["weight"], state["sum"])
        o_BHV = self.one_step(z_BHT[..., 0], v_BHTV[:, :, 0], carry)
        return self.output(o_BHV[:, :, None], x_BTD)[:, 0], state
