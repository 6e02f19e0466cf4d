"""Attention as a token mixer: queries, a memory of earlier tokens, a pattern of who sees whom, scores, an output.

q = queries(x)
entries = memory(x), or memory(context), kept in the slots of the pattern
k, v = memory.read(entries of the tokens that the pattern brings back)
y = output(scores(q, k, v), x)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_blocks import Sight
from mixforge.search_space.parts.attention_experts import Route, Routing
from mixforge.search_space.parts.attention_heads import Output, Queries
from mixforge.search_space.parts.attention_memory import Memory
from mixforge.search_space.parts.attention_mix import HeadMix
from mixforge.search_space.parts.attention_pattern import Pattern
from mixforge.search_space.parts.attention_position import Position
from mixforge.search_space.parts.attention_scores import Biased, ForgetGate, Fused, Scored
from mixforge.search_space.parts.layer import Pass, TokenMixer


class Attention(TokenMixer):
    """A cache of [B, heads, slots, channels] for each entry that is kept of a token, behind `meta` learned entries."""

    def __init__(
        self,
        queries: Queries,
        memory: Memory,
        position: Position,
        pattern: Pattern,
        scores: Fused | Biased | Scored,
        output: Output,
        forget: ForgetGate | None,
        routing: Routing | None,
        meta: int,
        crosses: bool,
    ) -> None:
        super().__init__()
        self.queries = queries
        self.memory = memory
        self.position = position
        self.pattern = pattern
        self.scores = scores
        self.output = output
        self.forget = forget
        self.routing = routing
        self.meta = meta
        self.crosses = crosses
        self.learned = nn.ParameterDict(
            {name: torch.randn(heads, meta, channels) for name, (heads, channels) in memory.kept().items()}
            if meta
            else {}
        )

    @property
    def mix(self) -> HeadMix | None:
        mix: HeadMix | None = getattr(self.scores, "mix", None)
        return mix

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        slots = self.pattern.slots(capacity)
        kept = {**self.memory.kept(), **({} if self.mix is None else self.mix.kept())}
        state = {
            name: torch.zeros(batch, heads, slots, channels, device=device, dtype=dtype)
            for name, (heads, channels) in kept.items()
        }
        state |= self.memory.initial_state(batch, device, dtype)
        state |= self.position.initial_state(batch, device, dtype)
        if self.forget is not None:
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            state["forget"] = torch.zeros(batch, self.forget.heads, slots, 1, device=device, dtype=exact)
            state |= self.forget.initial_state(batch, device, dtype)
        return state

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        self.pattern.prepare(at, self.training and state is None)
        angle = self.position.angles(x_BTD, at.positions_T, state)
        present, mix = self.present(x_BTD, angle, state, at)
        entries, key_S = present, at.positions_T
        if state is not None:
            entries = {name: self.pattern.extend(state[name], new, at.start) for name, new in present.items()}
        if state is not None or at.start > 0:
            key_S = self.pattern.meets(at.start, x_BTD.shape[1], x_BTD.device)
        k_BHSK, v_BHSV = self.memory.read(self.behind_learned(entries), self.late(x_BTD, key_S), at)
        k_BHSK, v_BHSV = self.prepared(k_BHSK, v_BHSV, key_S, at)
        sight = Sight(at.positions_T, key_S, self.pattern, entries, present, mix, self.meta, x_BTD)
        route = None if self.routing is None else self.routing(x_BTD)
        o_BHTV = self.scores(self.ask(x_BTD, angle, at, route), k_BHSK, v_BHSV, sight)
        return self.output(o_BHTV, x_BTD, route), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        x_BTD = x_BD[:, None]
        self.pattern.prepare(at, False)
        angle = self.position.angles(x_BTD, at.positions_T, state)
        present, mix = self.present(x_BTD, angle, state, at)
        for name, new in present.items():
            state[name].index_copy_(2, self.pattern.slot(at.positions_T, state[name].shape[2]), new)
        entries = {name: state[name] for name in present}
        some = next(iter(entries.values())) if entries else at.shared["cache"][0]
        key_S = self.pattern.held(at.positions_T, some.shape[2])
        k_BHSK, v_BHSV = self.memory.read_step(self.behind_learned(entries), self.late(x_BTD, key_S), at)
        k_BHSK, v_BHSV = self.prepared(k_BHSK, v_BHSV, key_S, at)
        sight = Sight(at.positions_T, key_S, self.pattern, entries, present, mix, self.meta, x_BTD)
        route = None if self.routing is None else self.routing(x_BTD)
        q_BHTK = self.memory.absorb(self.ask(x_BTD, angle, at, route))
        o_BHTV = self.memory.release(self.scores.step(q_BHTK, k_BHSK, v_BHSV, sight))
        return self.output(o_BHTV, x_BTD, route)[:, 0], state

    def present(
        self, x_BTD: Tensor, angle: Tensor | None, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What is kept of the tokens of this pass, and how they mix heads as queries."""
        given_BTD = at.shared["context"][0] if self.crosses else x_BTD
        entries, mix = self.memory.entries(given_BTD, angle, state, at), None
        if self.forget is not None:
            entries = {**entries, "forget": self.forget(x_BTD, state)}
        if self.mix is not None:
            mix, kept = self.mix.make(x_BTD)
            entries = {**entries, **kept}
        return entries, mix

    def ask(self, x_BTD: Tensor, angle: Tensor | None, at: Pass, route: Route | None) -> Tensor:
        """Queries [B, H, T, K]."""
        q_BHTK: Tensor = self.queries(x_BTD, angle, self.pattern.visible(at.positions_T), route)
        return self.position.scaled(q_BHTK, at.positions_T[-1] - at.positions_T, 1)

    def late(self, x_BTD: Tensor, key_S: Tensor) -> Tensor | None:
        """Angles of the tokens that are read, for a memory that keeps keys unturned; learned ones are not turned."""
        angle = self.position.angles(x_BTD, key_S, None) if self.memory.turns_late else None
        return None if angle is None else F.pad(angle, (0, 0, 0, 0, self.meta, 0))

    def behind_learned(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The memory's entries behind the learned ones."""
        if not self.meta:
            return entries
        batch = len(next(iter(entries.values())))
        return {
            name: torch.cat([first.expand(batch, -1, -1, -1), entries[name]], 2)
            for name, first in self.learned.items()
        }

    def prepared(self, k_BHSK: Tensor, v_BHSV: Tensor, key_S: Tensor, at: Pass) -> tuple[Tensor, Tensor]:
        """Publish keys and values where layers above read them; scale the keys; pair the values."""
        if self.memory.publishes:
            at.shared["cache"] = (k_BHSK[:, :, self.meta :], v_BHSV[:, :, self.meta :])
        # Learned keys are scaled as the last token is, not at all.
        away_S = F.pad(at.positions_T[-1] - key_S, (self.meta, 0))
        k_BHSK = self.position.scaled(k_BHSK, away_S, -1)
        difference = self.output.difference
        return k_BHSK, v_BHSV if difference is None else difference.pair(v_BHSV)
