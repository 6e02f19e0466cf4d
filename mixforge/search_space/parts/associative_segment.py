"""Layers that read a sequence in segments, each block with an associative memory of the segments before.

A block is a token mixer and what follows it up to the next one. In segment s, with m memory tokens at its end that are
the same learned ones in every segment:

    h = x + A^T f(W_q x) / (z . f(W_q x) + e),  y = block(h)           for all tokens
    v' = A^T k_j / (z . k_j + e),  k_j = f(W_k y_j)                     for the outputs y_j of the memory tokens
    A <- A + sum_j b_j k_j (W_v y_j - v'_j)^T,  b_j = sigmoid(w_b . y_j)
    z <- z + sum_j g_j k_j,  g_j = clip(1 - z . k_j / |k_j|^2, 0, 1), without a gradient

f(x) = r / |r|, r the products of each entry of [relu(x), relu(-x)] with its neighbours 1 to 3 places away. A and z
begin at zero, W_v at zero. As in `segment`, what lies between two segments is done on the way or by `between`.

Source: Rodkin, Kuratov, Bulatov and Burtsev 2024 (arXiv 2407.04841), equations 1 to 6, and its public code; the map f
is that of Schlag, Irie and Schmidhuber 2021 (arXiv 2102.11174), equation 37, with nu = 3.

Departure: the code wraps layers that are attention and a feed-forward part each, in which a block may here be any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.residual import Unit

NU = 3
_EPS = 1e-5


def neighbour_products(x: Tensor) -> Tensor:
    """[..., K] -> [..., 2 NU K], of unit length."""
    both = torch.cat([F.relu(x), F.relu(-x)], -1)
    rolled = torch.cat([both.roll(shift, -1) for shift in range(1, NU + 1)], -1)
    return F.normalize(torch.cat([both] * NU, -1) * rolled, dim=-1)


class AssociativeBlock(nn.Module):
    """A block and what it reads from and writes to its memory: A [B, N, D] and z [B, N]."""

    def __init__(self, width: int, key_dim: int, body: Unit) -> None:
        super().__init__()
        self.body = body
        self.slots = 2 * NU * key_dim
        self.query = Dense(width, key_dim, bias=False)
        self.key = Dense(width, key_dim, bias=False)
        self.value = Dense(width, width, bias=False)
        self.strength = Dense(width, 1)
        nn.init.zeros_(self.value.weight)

    def read(self, x_BTD: Tensor, matrix_BND: Tensor, norm_BN: Tensor) -> Tensor:
        """What the block is given."""
        return x_BTD + recall(neighbour_products(self.query(x_BTD)), matrix_BND, norm_BN)

    def write(self, y_BMD: Tensor, matrix_BND: Tensor, norm_BN: Tensor) -> tuple[Tensor, Tensor]:
        """The memory after the outputs of the memory tokens."""
        key_BMN = neighbour_products(self.key(y_BMD)).to(norm_BN.dtype)
        correction_BMD = self.value(y_BMD) - recall(key_BMN, matrix_BND, norm_BN)
        written_BMD = (torch.sigmoid(self.strength(y_BMD)) * correction_BMD).to(matrix_BND.dtype)
        known_BM = (key_BMN * norm_BN[:, None]).sum(-1) / key_BMN.square().sum(-1).clamp_min(1e-12)
        new_BM = (1 - known_BM).clamp(0, 1).detach()
        return (
            matrix_BND + key_BMN.transpose(1, 2) @ written_BMD,
            norm_BN + (new_BM[..., None] * key_BMN).sum(1),
        )


def recall(key_BTN: Tensor, matrix_BND: Tensor, norm_BN: Tensor) -> Tensor:
    """A^T k / (z . k + e)."""
    wide_BTN = key_BTN.to(norm_BN.dtype)
    weight_BT1 = (wide_BTN * norm_BN[:, None]).sum(-1, keepdim=True) + _EPS
    return (wide_BTN @ matrix_BND / weight_BT1).to(key_BTN.dtype)


class AssociativeSegments(Unit):
    """Blocks over segments of `length` tokens, with `memory` tokens after each."""

    def __init__(self, width: int, length: int, memory: int, blocks: Sequence[AssociativeBlock]) -> None:
        super().__init__()
        self.width = width
        self.length = length
        self.blocks = nn.ModuleList(blocks)
        self.memory = nn.Parameter(torch.randn(memory, width) * width**-0.5)
        self.states = 1 + sum(block.body.states for block in blocks)

    def block(self, index: int) -> AssociativeBlock:
        block = self.blocks[index]
        assert isinstance(block, AssociativeBlock)
        return block

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The memories of all blocks before the first segment, in float32 or better."""
        exact = torch.promote_types(dtype, torch.float32)
        state: dict[str, Tensor] = {}
        for index in range(len(self.blocks)):
            slots = self.block(index).slots
            state[f"{index}.matrix"] = torch.zeros(batch, slots, self.width, device=device, dtype=exact)
            state[f"{index}.norm"] = torch.zeros(batch, slots, device=device, dtype=exact)
        return state

    def inside(self, batch: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """The states of the blocks at the beginning of a segment."""
        slots = self.length + len(self.memory)
        each = [
            self.block(index).body.initial_states(batch, slots, device, dtype)
            for index in range(len(self.blocks))
        ]
        return [state for states in each for state in states]

    def initial_states(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        return [self.empty(batch, device, dtype), *self.inside(batch, device, dtype)]

    def over(
        self,
        x_BTD: Tensor,
        kept: dict[str, Tensor],
        states: list[dict[str, Tensor]] | None,
        begin: int,
        writes: bool,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
        """Tokens from place `begin` of a segment, the last of them memory tokens if it `writes`."""
        after: list[dict[str, Tensor]] = []
        new: dict[str, Tensor] = {}
        at = Pass(torch.arange(begin, begin + x_BTD.shape[1], device=x_BTD.device), begin)
        for index in range(len(self.blocks)):
            block = self.block(index)
            memory = kept[f"{index}.matrix"], kept[f"{index}.norm"]
            mine = None if states is None else states[len(after) : len(after) + block.body.states]
            x_BTD, done = block.body(block.read(x_BTD, *memory), mine, at)
            after += done or []
            if writes:
                memory = block.write(x_BTD[:, -len(self.memory) :], *memory)
            new[f"{index}.matrix"], new[f"{index}.norm"] = memory
        return x_BTD, new, after

    def forward(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]] | None, at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        if states is None:
            return self.whole(x_BTD), None
        kept, inside, outputs, done = states[0], states[1:], [], 0
        while done < x_BTD.shape[1]:
            place = (at.start + done) % self.length
            if place == 0 and at.start + done > 0:
                self.begin([kept, *inside])
            end = min(done + self.length - place, x_BTD.shape[1])
            y_BTD, _, inside = self.over(x_BTD[:, done:end], kept, inside, place, writes=False)
            outputs.append(y_BTD)
            done = end
        return torch.cat(outputs, 1), [kept, *inside]

    def whole(self, x_BTD: Tensor) -> Tensor:
        """A sequence from its beginning, one pass of the blocks for each segment."""
        kept = self.empty(len(x_BTD), x_BTD.device, x_BTD.dtype)
        memory = self.memory.expand(len(x_BTD), -1, -1)
        pieces, outputs = torch.split(x_BTD, self.length, 1), []
        for number, piece in enumerate(pieces, 1):
            writes = number < len(pieces)
            given = torch.cat([piece, memory], 1) if writes else piece
            y_BTD, kept, _ = self.over(given, kept, None, 0, writes)
            outputs.append(y_BTD[:, : piece.shape[1]])
        return torch.cat(outputs, 1)

    def between(self, states: list[dict[str, Tensor]], length: int) -> None:
        place = length % self.length
        if place == 0 and length > 0:
            self.begin(states)
        done = 1
        for index in range(len(self.blocks)):
            body = self.block(index).body
            body.between(states[done : done + body.states], place)
            done += body.states

    def begin(self, states: list[dict[str, Tensor]]) -> None:
        """Let the memory tokens of the segment before write, and begin anew."""
        kept, inside = states[0], states[1:]
        batch = len(kept["0.norm"])
        memory = self.memory.expand(batch, -1, -1)
        _, new, _ = self.over(memory, kept, inside, self.length, writes=True)
        fresh = self.inside(batch, memory.device, memory.dtype)
        # The tensors stay the same, as a captured graph of a step knows them.
        for state, changed in zip(states, [new, *fresh], strict=True):
            for name, tensor in state.items():
                tensor.copy_(changed[name])

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        kept, after = states[0], list[dict[str, Tensor]]()
        inner = Pass(at.positions_T % self.length, 0)
        for index in range(len(self.blocks)):
            block = self.block(index)
            read_BTD = block.read(x_BD[:, None], kept[f"{index}.matrix"], kept[f"{index}.norm"])
            mine = states[1 + len(after) : 1 + len(after) + block.body.states]
            x_BD, done = block.body.step(read_BTD[:, 0], mine, inner)
            after += done
        return x_BD, [kept, *after]
