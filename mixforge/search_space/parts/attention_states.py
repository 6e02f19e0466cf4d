"""Keys and values that a state space makes of chunks of tokens.

    k'_t = W_k x_t,   k_t = k'_t + s_t,   s = SSM_k(k' of the chunk of t, up to t)        values alike

SSM is a block of its own for keys and one for values, whose state begins anew with each chunk of c tokens. So what is
made of the last token of a chunk is made of the whole chunk. With a pattern that keeps the chunks' last tokens, cache
and scores shrink by c.

Source: Akhauri, Huda and Abdelfattah 2024 (Attamba, arXiv 2411.17685) and its public code, in the form that keeps the
projections before the blocks and a residual around them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_heads import normalised
from mixforge.search_space.parts.attention_memory import Memory
from mixforge.search_space.parts.attention_position import turned
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads

State = dict[str, Tensor]


class ByChunk(nn.Module):
    """A token mixer whose state, of zeros at first, begins anew every `chunk` tokens."""

    def __init__(self, mixer: TokenMixer, chunk: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.chunk = chunk

    def forward(self, x_BTF: Tensor, state: State | None, at: Pass) -> Tensor:
        """[B, T, F] -> [B, T, F]. The state is brought up to date in place."""
        if state is None:
            return self.whole(x_BTF)
        if x_BTF.shape[1] == 1:
            return self.one(x_BTF, state, at)
        # The rest of the chunk that is under way, whole chunks, the beginning of another.
        begin, length = at.start % self.chunk, x_BTF.shape[1]
        first = min(length, -begin % self.chunk)
        last = (length - first) % self.chunk
        outputs = [self.piece(x_BTF[:, :first], state, begin)] if first > 0 else []
        if length - first - last > 0:
            outputs.append(self.whole(x_BTF[:, first : length - last]))
        if last > 0:
            for tensor in state.values():
                tensor.zero_()
            outputs.append(self.piece(x_BTF[:, length - last :], state, 0))
        return torch.cat(outputs, 1)

    def whole(self, x_BTF: Tensor) -> Tensor:
        """Chunks as sequences of their own, the last one filled up with zeros."""
        length = x_BTF.shape[1]
        padded = F.pad(x_BTF, (0, 0, 0, -length % self.chunk))
        folded = torch.unflatten(padded, 1, (-1, self.chunk)).flatten(0, 1)
        y, _ = self.mixer(folded, None, Pass(torch.arange(self.chunk, device=x_BTF.device), 0))
        y_BTF: Tensor = y.reshape(padded.shape)
        return y_BTF[:, :length]

    def piece(self, x_BTF: Tensor, state: State, begin: int) -> Tensor:
        """Tokens of one chunk, from place `begin` of it on."""
        place = torch.arange(begin, begin + x_BTF.shape[1], device=x_BTF.device)
        y_BTF: Tensor
        y_BTF, after = self.mixer(x_BTF, state, Pass(place, begin))
        for name, tensor in state.items():
            tensor.copy_(after[name])
        return y_BTF

    def one(self, x_B1F: Tensor, state: State, at: Pass) -> Tensor:
        """One token, whose place follows from its position alone."""
        place = at.positions_T % self.chunk
        for tensor in state.values():
            tensor.masked_fill_(place == 0, 0)
        y_BF, _ = self.mixer.step(x_B1F[:, 0], state, Pass(place, 0))
        return y_BF[:, None]


class ChunkStates(Memory):
    """Keys and values of `heads` heads, each through a mixer of its own."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        key: nn.Module,
        value: nn.Module,
        key_norm: nn.Module | None,
        whole: bool,
        key_states: ByChunk,
        value_states: ByChunk,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.whole = whole
        self.key = key
        self.value = value
        self.key_norm = key_norm
        self.key_states = key_states
        self.value_states = value_states

    def kept(self) -> dict[str, tuple[int, int]]:
        return {"key": (self.heads, self.head_dim), "value": (self.heads, self.head_dim)}

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        made = {"key": self.key_states.mixer, "value": self.value_states.mixer}
        return {
            f"{prefix}_{name}": tensor
            for prefix, mixer in made.items()
            for name, tensor in mixer.initial_state(batch, 0, device, dtype).items()
        }

    def entries(self, x_BTD: Tensor, angle: Tensor | None, state: State | None, at: Pass) -> State:
        k_BTF, v_BTF = self.key(x_BTD), self.value(x_BTD)
        k_BTF = k_BTF + self.key_states(k_BTF, with_prefix("key_", state), at)
        v_BTF = v_BTF + self.value_states(v_BTF, with_prefix("value_", state), at)
        k_BTHK = turned(normalised(k_BTF, self.heads, self.key_norm, self.whole), angle)
        return {"key": k_BTHK.transpose(1, 2), "value": split_heads(v_BTF, self.heads).transpose(1, 2)}

    def read(self, entries: State, angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        return entries["key"], entries["value"]


def with_prefix(prefix: str, state: State | None) -> State | None:
    """The tensors whose names begin so, by the rest of their names."""
    if state is None:
        return None
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
