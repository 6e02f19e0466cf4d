"""Attention in segments that a memory learning at test time gives a context: the module of `mac`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.attention import attend
from mixforge.kernels.dense import dense
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads
from mixforge.search_space.parts.norm import SimpleRMSNorm
from mixforge.search_space.parts.rotary import rotate
from mixforge.search_space.parts.test_time_memory import (
    Memory,
    TestTimeMemory,
    gates_of,
    unit,
    usual_gates,
)

_THETA = 10000.0
# Keys and values of what the memory has read, and of the tokens.
_KEPT = ("context_key", "context_value", "key", "value")


class MemoryAsContext(TokenMixer):
    """[B, T, D] -> [B, T, D]. The state has the memory, and keys and values of the segment's tokens and of its context.

    A segment is a chunk of the memory, so that `Memory.start` is what the segments before have left.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        persistent: int,
        memory: TestTimeMemory,
        norm: nn.Module,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.query = Dense(width, inner, bias=False)
        self.key_value = Dense(width, 2 * inner, bias=False)
        self.persistent = nn.Parameter(torch.randn(2, heads, persistent, head_dim))
        self.out = Dense(inner, width, bias=False)
        self.memory = memory
        self.before = SimpleRMSNorm()
        # W_q, W_k and W_v of the memory.
        self.learn = Dense(width, 3 * inner, bias=False)
        self.gates = Dense(width, 3 * heads)
        self.norm = norm
        self.recall = Dense(inner, width, bias=False)
        with torch.no_grad():
            self.gates.bias.copy_(usual_gates(memory, heads))

    @property
    def segment(self) -> int:
        return self.memory.chunk

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            tensors = self.memory.initial(batch).tensors()
        state = {name: tensor.to(device, copy=True).contiguous() for name, tensor in tensors.items()}
        shape = (batch, self.heads, min(capacity, self.segment), self.head_dim)
        return state | {name: torch.zeros(shape, device=device, dtype=dtype) for name in _KEPT}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        memory = self.memory.initial(len(x_BTD)) if state is None else self.memory.stored(state)
        outputs, done = [], 0
        while done < x_BTD.shape[1]:
            place = (at.start + done) % self.segment
            if place == 0:
                memory = self.memory.begun(memory)
            count = min(self.segment - place, x_BTD.shape[1] - done)
            x, position = x_BTD[:, done : done + count], at.positions_T[done : done + count]
            entries = self.entries(x, memory, position)
            if state is not None:
                for name, new in entries.items():
                    state[name][:, :, place : place + count] = new
                entries = {name: state[name][:, :, : place + count] for name in _KEPT}
            slot = torch.arange(place + count, device=x.device)
            y = self.attended(x, entries, position, slot <= slot[place:, None])
            told = self.before(y)
            q, k, v = self.taught(told)
            gates = gates_of(self.memory, self.gates(told), self.heads)
            read, memory = self.memory(q, k, v, gates, memory, at.start + done)
            outputs.append(y * torch.sigmoid(self.recalled(read, y.dtype)))
            done += count
        rings = {} if state is None else {name: state[name] for name in _KEPT}
        return torch.cat(outputs, 1), None if state is None else memory.tensors() | rings

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        position, x_B1D = at.positions_T, x_BD[:, None]
        memory = self.memory.begun_at(self.memory.stored(state), position)
        place = position % self.segment
        for name, new in self.entries(x_B1D, memory, position).items():
            state[name].index_copy_(2, place, new)
        entries = {name: state[name] for name in _KEPT}
        seen = torch.arange(entries["key"].shape[2], device=x_BD.device) <= place[:, None]
        y_B1D = self.attended(x_B1D, entries, position, seen)
        told = self.before(y_B1D)
        q, k, v = (each[:, :, 0] for each in self.taught(told))
        gates = gates_of(self.memory, self.gates(told), self.heads)
        read_BHK, memory = self.memory.step(q, k, v, gates, memory, position)
        for name, tensor in memory.tensors().items():
            state[name].copy_(tensor)
        gate_B1D = torch.sigmoid(self.recalled(read_BHK[:, :, None], x_BD.dtype))
        return (y_B1D * gate_B1D)[:, 0], state

    def entries(self, x_BTD: Tensor, memory: Memory, positions_T: Tensor) -> dict[str, Tensor]:
        """Keys and values [B, H, T, K] of tokens, and of what the memory at their segment's beginning says of them."""
        asks = self.learn.weight[: self.heads * self.head_dim]
        q_BHTK = split_heads(exact(F.silu(dense(self.before(x_BTD), asks))), self.heads).transpose(1, 2)
        h_BTD = self.recalled(self.memory.read(memory.start, unit(q_BHTK)), x_BTD.dtype)
        found = {}
        for prefix, given in (("context_", h_BTD), ("", x_BTD)):
            k, v = (split_heads(each, self.heads) for each in self.key_value(given).chunk(2, -1))
            found[f"{prefix}key"] = rotate(k, positions_T, _THETA).transpose(1, 2)
            found[f"{prefix}value"] = v.transpose(1, 2)
        return found

    def attended(
        self, x_BTD: Tensor, entries: dict[str, Tensor], positions_T: Tensor, seen_TS: Tensor
    ) -> Tensor:
        """What attention to persistent tokens, context and segment says of tokens."""
        q_BTHK = rotate(split_heads(self.query(x_BTD), self.heads), positions_T, _THETA)
        k, v = (
            torch.cat([first.expand(len(x_BTD), -1, -1, -1), entries[f"context_{name}"], entries[name]], 2)
            for first, name in zip(self.persistent, ("key", "value"), strict=True)
        )
        seen = F.pad(torch.cat([seen_TS, seen_TS], 1), (self.persistent.shape[2], 0), value=True)
        o_BHTK = attend(q_BTHK.transpose(1, 2), k, v, seen)
        y_BTD: Tensor = self.out(o_BHTK.transpose(1, 2).flatten(2))
        return y_BTD

    def taught(self, y_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The memory's queries, keys and values [B, H, T, K] of what attention says, normed."""
        parts = exact(F.silu(self.learn(y_BTD))).chunk(3, -1)
        q, k, v = (split_heads(part, self.heads).transpose(1, 2) for part in parts)
        return unit(q), unit(k), v

    def recalled(self, read_BHTK: Tensor, dtype: torch.dtype) -> Tensor:
        """What a memory says of tokens [B, T, D]."""
        y_BTD: Tensor = self.recall(self.norm(read_BHTK.transpose(1, 2).to(dtype)).flatten(2))
        return y_BTD
