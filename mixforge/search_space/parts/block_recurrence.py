"""Attention to a window and to state vectors that change once a block: the modules of `blockrec`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixforge.kernels.attention import attend, step_attention
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads
from mixforge.search_space.parts.rotary import rotate

_THETA = 10000.0


class StateVectors(nn.Module):
    """S vectors [B, S, D]: what tokens see of them, and how a block of tokens changes them."""

    def __init__(self, width: int, heads: int, head_dim: int, states: int, norm: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.first = nn.Parameter(torch.randn(states, width))
        self.identity = nn.Parameter(torch.randn(states, width) * 0.02)
        self.norm = norm
        self.project = nn.Linear(width, 4 * inner, bias=False)
        self.change = nn.Linear(2 * inner, width)
        self.gate = nn.Parameter(torch.ones(width))

    def ask(self, c_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, queries of the states and queries of the tokens, each [B, H, S, K]."""
        parts = self.project(self.norm(c_BSD + self.identity)).chunk(4, -1)
        k, v, q, p = (split_heads(part, self.heads).transpose(1, 2) for part in parts)
        return k, v, q, p

    def after(
        self, c_BSD: Tensor, asked: tuple[Tensor, Tensor, Tensor, Tensor], k_BHTK: Tensor, v_BHTK: Tensor
    ) -> Tensor:
        """The states after a block of tokens with these keys, not rotated, and values."""
        k, v, q, p = asked
        read = torch.cat([attend(q, k, v, None), attend(p, k_BHTK, v_BHTK, None)], -1)
        keep = torch.sigmoid(self.gate)
        change_BSD: Tensor = self.change(joined(read))
        return keep * c_BSD + (1 - keep) * change_BSD


def joined(read_BHTF: Tensor) -> Tensor:
    """[B, H, T, F] -> [B, T, H*F]."""
    return read_BHTF.transpose(1, 2).flatten(2)


class BlockRecurrence(TokenMixer):
    """The state keeps rings of the last W tokens, the state vectors and their keys and values."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        window: int,
        vectors: StateVectors,
        operation: Callable[[Tensor, Tensor, Tensor, int, int], Tensor],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.window = window
        self.vectors = vectors
        self.operation = operation
        inner = heads * head_dim
        self.project = nn.Linear(width, 4 * inner, bias=False)
        self.out = nn.Linear(2 * inner, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        slots = min(self.window, capacity)
        shape = (batch, self.heads, slots, self.head_dim)
        ring = {
            name: torch.zeros(shape, device=device, dtype=dtype) for name in ("key", "value", "plain_key")
        }
        with torch.no_grad():
            c_BSD = self.vectors.first.expand(batch, -1, -1).to(device=device, dtype=dtype)
            k_BHSK, v_BHSK, _, _ = self.vectors.ask(c_BSD)
        return {**ring, "vectors": c_BSD.clone(), "state_key": k_BHSK.clone(), "state_value": v_BHSK.clone()}

    def ask(self, x_BTD: Tensor, positions_T: Tensor) -> tuple[Tensor, ...]:
        """Of tokens [B, T, D]: keys and queries rotated, keys as they are, values, queries of the states."""
        parts = self.project(x_BTD).chunk(4, -1)
        plain, v, q, p = (split_heads(part, self.heads) for part in parts)
        found = (rotate(plain, positions_T, _THETA), rotate(q, positions_T, _THETA), plain, v, p)
        return tuple(each.transpose(1, 2) for each in found)

    def answer(self, own_BHTK: Tensor, states_BHTK: Tensor) -> Tensor:
        """[B, T, D] of what was read of the window and of the states."""
        y: Tensor = self.out(joined(torch.cat([own_BHTK, states_BHTK], -1)))
        return y

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        k, q, plain, v, p = self.ask(x_BTD, at.positions_T)
        if state is None:
            own = self.operation(q, k, v, self.window, 0)
            return self.answer(own, self.over_blocks(p, plain, v)), None
        past = min(at.start, self.window - 1)
        ring = torch.arange(at.start - past, at.start, device=x_BTD.device) % state["key"].shape[2]
        wide_k, wide_v = (
            torch.cat([state[name][:, :, ring], new], 2) for name, new in (("key", k), ("value", v))
        )
        own = self.operation(q, wide_k, wide_v, self.window, past)
        read, done = [], 0
        while done < x_BTD.shape[1]:
            start = at.start + done
            self.between(state, start)
            end = min(done + self.window - start % self.window, x_BTD.shape[1])
            read.append(attend(p[:, :, done:end], state["state_key"], state["state_value"], None))
            slots = at.positions_T[done:end] % state["key"].shape[2]
            for name, new in (("key", k), ("value", v), ("plain_key", plain)):
                state[name].index_copy_(2, slots, new[:, :, done:end])
            done = end
        return self.answer(own, torch.cat(read, 2)), state

    def over_blocks(self, p_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
        """What the tokens of a sequence from its beginning read of the states, block by block."""
        c_BSD = self.vectors.first.expand(len(p_BHTK), -1, -1)
        read = []
        length = p_BHTK.shape[2]
        for begin in range(0, length, self.window):
            end = begin + self.window
            asked = self.vectors.ask(c_BSD)
            read.append(attend(p_BHTK[:, :, begin:end], asked[0], asked[1], None))
            if end < length:
                c_BSD = self.vectors.after(c_BSD, asked, k_BHTK[:, :, begin:end], v_BHTK[:, :, begin:end])
        return torch.cat(read, 2)

    @torch.no_grad()
    def between(self, state: dict[str, Tensor], length: int) -> None:
        if length % self.window != 0 or length == 0:
            return
        asked = self.vectors.ask(state["vectors"])
        new_BSD = self.vectors.after(state["vectors"], asked, state["plain_key"], state["value"])
        k_BHSK, v_BHSK, _, _ = self.vectors.ask(new_BSD)
        for name, new in (("vectors", new_BSD), ("state_key", k_BHSK), ("state_value", v_BHSK)):
            state[name].copy_(new)

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        k, q, plain, v, p = self.ask(x_BD[:, None], at.positions_T)
        ring = at.positions_T % state["key"].shape[2]
        for name, new in (("key", k), ("value", v), ("plain_key", plain)):
            state[name].index_copy_(2, ring, new)
        # A full ring has every slot filled, so the mask of a growing cache is right for it too.
        own = step_attention(q, state["key"], state["value"], at.positions_T)
        read = attend(p, state["state_key"], state["state_value"], None)
        return self.answer(own, read)[:, 0], state
