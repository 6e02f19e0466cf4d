"""Attention as a token mixer: queries, a memory of earlier tokens, a pattern of who sees whom, scores, an output.

q = queries(x)        entries = memory(x), kept in the slots of the pattern
k, v = memory.read(entries of the tokens that the pattern brings back)
y = output(scores(q, k, v), x)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixforge.search_space.parts.attention_heads import Output, Queries
from mixforge.search_space.parts.attention_memory import Memory
from mixforge.search_space.parts.attention_pattern import Pattern
from mixforge.search_space.parts.attention_position import Position
from mixforge.search_space.parts.attention_scores import Fused, Sight
from mixforge.search_space.parts.layer import Pass, TokenMixer


class Attention(TokenMixer):
    """A cache of [B, heads, slots, channels] for each entry that is kept of a token."""

    def __init__(
        self,
        queries: Queries,
        memory: Memory,
        position: Position,
        pattern: Pattern,
        scores: Fused,
        output: Output,
    ) -> None:
        super().__init__()
        self.queries = queries
        self.memory = memory
        self.position = position
        self.pattern = pattern
        self.scores = scores
        self.output = output

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        slots = self.pattern.slots(capacity)
        return {
            name: torch.zeros(batch, heads, slots, channels, device=device, dtype=dtype)
            for name, (heads, channels) in self.memory.kept().items()
        }

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        self.pattern.prepare(at, self.training and state is None)
        angle = self.position.angles(x_BTD, at.positions_T, state)
        present = self.memory.entries(x_BTD, angle)
        entries, key_S = present, at.positions_T
        if state is not None:
            entries = {name: self.pattern.extend(state[name], new, at.start) for name, new in present.items()}
            key_S = self.pattern.meets(at.start, x_BTD.shape[1], x_BTD.device)
        k_BHSK, v_BHSV = self.memory.read(entries, at)
        if self.memory.publishes:
            at.shared["cache"] = (k_BHSK, v_BHSV)
        sight = Sight(at.positions_T, key_S, self.pattern, entries, present)
        o_BHTV = self.scores(self.queries(x_BTD, angle), k_BHSK, v_BHSV, sight)
        return self.output(o_BHTV, x_BTD), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        x_BTD = x_BD[:, None]
        self.pattern.prepare(at, False)
        angle = self.position.angles(x_BTD, at.positions_T, state)
        present = self.memory.entries(x_BTD, angle)
        for name, new in present.items():
            state[name].index_copy_(2, self.pattern.slot(at.positions_T, state[name].shape[2]), new)
        entries = {name: state[name] for name in present}
        k_BHSK, v_BHSV = self.memory.read(entries, at)
        if self.memory.publishes:
            at.shared["cache"] = (k_BHSK, v_BHSV)
        key_S = self.pattern.held(at.positions_T, k_BHSK.shape[2])
        sight = Sight(at.positions_T, key_S, self.pattern, entries, present)
        o_BHTV = self.scores.step(self.queries(x_BTD, angle), k_BHSK, v_BHSV, sight)
        return self.output(o_BHTV, x_BTD)[:, 0], state
