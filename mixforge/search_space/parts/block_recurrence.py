"""Attention to tokens that are near and to state vectors that change once a block: the module of `blockrec`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.attention import attend, step_attention
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads
from mixforge.search_space.parts.rotary import rotate
from mixforge.search_space.parts.state_vectors import StateVectors

_THETA = 10000.0


class BlockRecurrence(TokenMixer):
    """The state keeps rings of the last W tokens, the state vectors with their keys and values, and what they note.

    With `apart` a token sees no token of an earlier block, without it the last W tokens. With `weighed` a number for
    each head weighs what was read of states against what was read of tokens, without it they stand side by side.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        window: int,
        apart: bool,
        weighed: bool,
        vectors: StateVectors,
        operation: Callable[[Tensor, Tensor, Tensor, int, int], Tensor],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.window = window
        self.apart = apart
        self.vectors = vectors
        self.operation = operation
        inner = heads * head_dim
        self.project = Dense(width, 4 * inner, bias=False)
        self.out = Dense(inner if weighed else 2 * inner, width, bias=False)
        # As in the reference code of the Cached Transformer.
        self.share = nn.Parameter(torch.full((heads,), -1.0)) if weighed else None

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        slots = min(self.window, capacity)
        shape = (batch, self.heads, slots, self.head_dim)
        ring = {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("key", "value")}
        noted = self.vectors.initial_state(batch, slots, device, dtype)
        with torch.no_grad():
            c_BSD = self.vectors.first.expand(batch, -1, -1).to(device=device, dtype=dtype)
            k_BHSK, v_BHSK = self.vectors.ask(c_BSD)[:2]
        states = {"vectors": c_BSD.clone(), "state_key": k_BHSK.clone(), "state_value": v_BHSK.clone()}
        return {**ring, **noted, **states}

    def ask(self, x_BTD: Tensor, positions_T: Tensor) -> tuple[Tensor, ...]:
        """Of tokens [B, T, D]: keys and queries rotated, keys as they are, values, queries of the states."""
        parts = self.project(x_BTD).chunk(4, -1)
        plain, v, q, p = (split_heads(part, self.heads) for part in parts)
        found = (rotate(plain, positions_T, _THETA), rotate(q, positions_T, _THETA), plain, v, p)
        return tuple(each.transpose(1, 2) for each in found)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        k, q, plain, v, p = self.ask(x_BTD, at.positions_T)
        own = self.near(q, k, v, state, at.start)
        if state is None:
            return self.answer(own, self.over_blocks(x_BTD, p, plain, v)), None
        read, done = [], 0
        while done < x_BTD.shape[1]:
            start = at.start + done
            self.between(state, start)
            some = slice(done, min(done + self.window - start % self.window, x_BTD.shape[1]))
            read.append(attend(p[:, :, some], state["state_key"], state["state_value"], None))
            place_T = at.positions_T[some] % self.window
            state["key"].index_copy_(2, place_T, k[:, :, some])
            state["value"].index_copy_(2, place_T, v[:, :, some])
            self.vectors.keep(state, x_BTD[:, some], plain[:, :, some], place_T)
            done = some.stop
        return self.answer(own, torch.cat(read, 2)), state

    def answer(self, own_BHTK: Tensor, states_BHTK: Tensor) -> Tensor:
        """[B, T, D] of what was read of the tokens and of the states."""
        if self.share is None:
            both_BHTF = torch.cat([own_BHTK, states_BHTK], -1)
        else:
            share_H11 = torch.sigmoid(self.share)[:, None, None]
            both_BHTF = share_H11 * states_BHTK + (1 - share_H11) * own_BHTK
        y_BTD: Tensor = self.out(both_BHTF.transpose(1, 2).flatten(2))
        return y_BTD

    def near(
        self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, state: dict[str, Tensor] | None, start: int
    ) -> Tensor:
        """What tokens read of one another, the first of them having `start` before it."""
        past = 0
        if state is not None:
            past = start % self.window if self.apart else min(start, self.window - 1)
        if state is None or past == 0:
            return self.from_first(q_BHTK, k_BHTK, v_BHTK)
        ring = torch.arange(start - past, start, device=q_BHTK.device) % state["key"].shape[2]
        lead = self.window - past if self.apart else q_BHTK.shape[2]
        k, v = (
            torch.cat([state[name][:, :, ring], new[:, :, :lead]], 2)
            for name, new in (("key", k_BHTK), ("value", v_BHTK))
        )
        own_BHTK = self.operation(q_BHTK[:, :, :lead], k, v, self.window, past)
        if lead >= q_BHTK.shape[2]:
            return own_BHTK
        rest = (x_BHTK[:, :, lead:] for x_BHTK in (q_BHTK, k_BHTK, v_BHTK))
        return torch.cat([own_BHTK, self.from_first(*rest)], 2)

    def from_first(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
        """As `near`, of tokens that see none before them."""
        batch, _, length, _ = q_BHTK.shape
        if not self.apart or length <= self.window:
            return self.operation(q_BHTK, k_BHTK, v_BHTK, self.window, 0)
        # Blocks that see nothing of one another, as sequences of their own.
        count = -(-length // self.window)
        folded = []
        for x_BHTK in (q_BHTK, k_BHTK, v_BHTK):
            padded = F.pad(x_BHTK, (0, 0, 0, count * self.window - length))
            folded.append(torch.unflatten(padded, 2, (count, self.window)).transpose(1, 2).flatten(0, 1))
        o = self.operation(folded[0], folded[1], folded[2], self.window, 0)
        o_BHTK: Tensor = torch.unflatten(o, 0, (batch, count)).transpose(1, 2).flatten(2, 3)
        return o_BHTK[:, :, :length]

    def over_blocks(self, x_BTD: Tensor, p_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
        """What the tokens of a sequence from its beginning read of the states, block by block."""
        c_BSD = self.vectors.first.expand(len(p_BHTK), -1, -1)
        read, noted = [], None
        length = p_BHTK.shape[2]
        for begin in range(0, length, self.window):
            block = slice(begin, begin + self.window)
            asked = self.vectors.ask(c_BSD)
            read.append(attend(p_BHTK[:, :, block], asked[0], asked[1], None))
            if block.stop < length:
                noted = self.vectors.note(x_BTD[:, block], k_BHTK[:, :, block], v_BHTK[:, :, block], noted)
                c_BSD = self.vectors.after(c_BSD, asked, noted)
        return torch.cat(read, 2)

    @torch.no_grad()
    def between(self, state: dict[str, Tensor], length: int) -> None:
        if length % self.window != 0 or length == 0:
            return
        new_BSD = self.vectors.after(state["vectors"], self.vectors.ask(state["vectors"]), state)
        k_BHSK, v_BHSK = self.vectors.ask(new_BSD)[:2]
        for name, new in (("vectors", new_BSD), ("state_key", k_BHSK), ("state_value", v_BHSK)):
            state[name].copy_(new)

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        k, q, plain, v, p = self.ask(x_BD[:, None], at.positions_T)
        place = at.positions_T % self.window
        state["key"].index_copy_(2, place, k)
        state["value"].index_copy_(2, place, v)
        self.vectors.keep(state, x_BD[:, None], plain, place)
        # A full ring has every slot filled, so the mask of a growing cache is right for it too.
        newest = place if self.apart else at.positions_T
        own = step_attention(q, state["key"], state["value"], newest)
        read = attend(p, state["state_key"], state["state_value"], None)
        return self.answer(own, read)[:, 0], state
