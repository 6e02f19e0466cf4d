"""Layers that read a sequence in segments and pass memory tokens from each to the next.

    [_; y_s; M_{s+1}] = stack([M_s; x_s; M_s]),  M_1 learned

The stack begins anew in each segment: its layers see the segment and the memory, no token before. As they are causal,
the first copy of the memory is read by every token, and the second, at the end, has read every token: what becomes of
it is the memory of the next segment. Gradients pass through all segments.

Between two segments there is work that belongs to no token: writing the memory and reading it. A sequence form does it
on the way; with one token at a time `between` does it, before the first token of a segment.

Source: Bulatov, Kuratov and Burtsev 2022 (arXiv 2207.06881), section 3.2 and equations 5 and 6.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.residual import Unit


class SegmentStack(Unit):
    """A body over segments of `length` tokens, with `memory` tokens before and after each."""

    def __init__(self, width: int, length: int, memory: int, body: Unit) -> None:
        super().__init__()
        self.length = length
        self.body = body
        self.memory = nn.Parameter(torch.randn(memory, width) * width**-0.5)
        self.states = 1 + body.states

    def initial_states(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        memory = self.memory.detach().to(device=device, dtype=dtype)
        inside = self.body.initial_states(batch, self.length + 2 * len(memory), device, dtype)
        return [{"memory": memory.expand(batch, -1, -1).clone()}, *inside]

    def forward(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]] | None, at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        if states is None:
            return self.whole(x_BTD), None
        memory, inside = states[:1], states[1:]
        tokens, outputs, done = len(self.memory), [], 0
        while done < x_BTD.shape[1]:
            place = (at.start + done) % self.length
            if place == 0:
                self.begin([*memory, *inside], at.start + done)
            end = min(done + self.length - place, x_BTD.shape[1])
            begin = tokens + place
            inner = Pass(torch.arange(begin, begin + end - done, device=x_BTD.device), begin)
            y_BTD, after = self.body(x_BTD[:, done:end], inside, inner)
            inside = after or []
            outputs.append(y_BTD)
            done = end
        return torch.cat(outputs, 1), [*memory, *inside]

    def whole(self, x_BTD: Tensor) -> Tensor:
        """A sequence from its beginning, one pass of the body for each segment."""
        tokens, outputs = len(self.memory), []
        memory = self.memory.expand(len(x_BTD), -1, -1)
        pieces = torch.split(x_BTD, self.length, 1)
        for number, piece in enumerate(pieces, 1):
            ends = [memory] if number < len(pieces) else []
            given = torch.cat([memory, piece, *ends], 1)
            y_BTD, _ = self.body(given, None, Pass(torch.arange(given.shape[1], device=given.device), 0))
            outputs.append(y_BTD[:, tokens : tokens + piece.shape[1]])
            memory = y_BTD[:, tokens + piece.shape[1] :]
        return torch.cat(outputs, 1)

    def between(self, states: list[dict[str, Tensor]], length: int) -> None:
        place = length % self.length
        if place == 0:
            self.begin(states, length)
        self.body.between(states[1:], len(self.memory) + place)

    def begin(self, states: list[dict[str, Tensor]], length: int) -> None:
        """Write the memory of the segment before token number `length`, if there is one; read it anew."""
        memory, inside = states[0]["memory"], states[1:]
        if length > 0:
            memory.copy_(self.over(memory, inside, len(self.memory) + self.length)[0])
        else:
            memory.copy_(self.memory.to(memory.dtype).expand_as(memory))
        slots = self.length + 2 * len(self.memory)
        fresh = self.body.initial_states(len(memory), slots, memory.device, memory.dtype)
        _, after = self.over(memory, fresh, 0)
        # The tensors stay the same, as a captured graph of a step knows them.
        for state, new in zip(inside, after, strict=True):
            for name, tensor in state.items():
                tensor.copy_(new[name])

    def over(
        self, memory: Tensor, states: list[dict[str, Tensor]], begin: int
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The memory tokens, from place `begin` of the segment."""
        at = Pass(torch.arange(begin, begin + memory.shape[1], device=memory.device), begin)
        y, after = self.body(memory, states, at)
        return y, after or []

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        inner = Pass(len(self.memory) + at.positions_T % self.length, 0)
        y_BD, inside = self.body.step(x_BD, states[1:], inner)
        return y_BD, [states[0], *inside]
