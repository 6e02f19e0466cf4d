"""Patterns of attention that go by blocks of tokens: who sees whom follows from positions, or from the blocks' means.

    strided(l)    t - s < l, or l divides t - s
    fixed(l, c)   s in the block of t, or among the last c tokens of its own block
    chunk(l)      s in the block of t
    checkpoints   s the last token of its block, or t itself

Blocks are of l tokens from the sequence's start.

Sources: Child et al. 2019 (arXiv 1904.10509), section 4.2, for strided and fixed patterns, with both index sets in every
head (its "merged" heads, section 5.1); attention to checkpoints alone, one for each segment, as in the compressed
attention of Jafari et al. 2025 (SCOUT, arXiv 2509.00935).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.search_space.parts.attention_pattern import EveryTokenKept, Pattern

Masked = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


class MaskedPairs(EveryTokenKept):
    """Patterns whose pairs are computed all, and those that are not seen masked. Abstract."""

    def __init__(self, masked: Masked) -> None:
        super().__init__()
        self.masked = masked

    def attend(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, query_T: Tensor, key_S: Tensor
    ) -> Tensor:
        seen = self.choose(q_BHTK, k_BHSK, query_T, key_S)
        return self.masked(q_BHTK, k_BHSK, v_BHSV, seen, q_BHTK.shape[3] ** -0.5)


class Strided(MaskedPairs):
    """The last `stride` tokens, and every `stride`-th one before them."""

    def __init__(self, stride: int, masked: Masked) -> None:
        super().__init__(masked)
        self.stride = stride

    def sees(self, query_T: Tensor, key_S: Tensor) -> Tensor:
        distance_TS = query_T[:, None] - key_S
        chosen = (distance_TS < self.stride) | (distance_TS % self.stride == 0)
        return (distance_TS >= 0) & (key_S >= 0) & chosen

    def visible(self, query_T: Tensor) -> Tensor:
        return (query_T + 1).clamp(max=self.stride) + query_T // self.stride


class Blocks(Pattern):
    """The last `kept` tokens of every earlier block, and with `near` all tokens of one's own block up to oneself.

    Without `near` a token sees itself alone in its own block. Of a cache, the tokens that are not kept share the
    first slots, which begin anew with each block; the kept ones have slots of their own behind them.
    """

    def __init__(self, block: int, kept: int, near: bool, masked: Masked) -> None:
        super().__init__()
        self.size = block
        self.kept = kept
        self.near = near
        self.masked = masked
        self.passing = block - kept if near else 1

    def is_kept(self, position: Tensor) -> Tensor:
        return position % self.size >= self.size - self.kept

    def sees(self, query_T: Tensor, key_S: Tensor) -> Tensor:
        query_T1 = query_T[:, None]
        earlier = (key_S // self.size < query_T1 // self.size) & self.is_kept(key_S)
        own = key_S // self.size == query_T1 // self.size if self.near else key_S == query_T1
        return (key_S <= query_T1) & (key_S >= 0) & (earlier | own)

    def visible(self, query_T: Tensor) -> Tensor:
        own = query_T % self.size + 1 if self.near else 1
        return query_T // self.size * self.kept + own

    def slots(self, capacity: int) -> int:
        return strided_slots(capacity, self.size, self.kept, self.near)

    def slot(self, positions_T: Tensor, slots: int) -> Tensor:
        offset = positions_T % self.size
        behind = min(self.passing, slots) + positions_T // self.size * self.kept
        own = offset if self.near else torch.zeros_like(offset)
        return torch.where(self.is_kept(positions_T), behind + offset - (self.size - self.kept), own)

    def held(self, position: Tensor, slots: int) -> Tensor:
        slot = torch.arange(slots, device=position.device)
        first = position // self.size * self.size
        if self.near:
            passing = torch.where(first + slot <= position, first + slot, first + slot - self.size)
        else:
            last = first + (position % self.size).clamp(max=self.size - self.kept - 1)
            passing = last.expand(slots)
        number = slot - min(self.passing, slots)
        kept = torch.full_like(slot, -1)
        if self.kept > 0:
            kept = number // self.kept * self.size + self.size - self.kept + number % self.kept
            kept = torch.where(kept <= position, kept, -1)
        return torch.where(number < 0, passing.clamp(min=-1), kept)

    def meets(self, start: int, length: int, device: torch.device) -> Tensor:
        past = torch.arange(start, device=device)
        own = (
            past >= start // self.size * self.size if self.near else torch.zeros_like(past, dtype=torch.bool)
        )
        return torch.cat([past[self.is_kept(past) | own], torch.arange(start, start + length, device=device)])

    def extend(self, cache: Tensor, new: Tensor, start: int) -> Tensor:
        slots, end = cache.shape[2], start + new.shape[2]
        past = self.meets(start, 0, new.device)
        met = torch.cat([cache[:, :, self.slot(past, slots)], new], 2) if start > 0 else new
        position = torch.arange(start, end, device=new.device)
        # Of the tokens that pass, only those that are left at the end are written: no slot is written twice.
        left = torch.isin(position, self.held(position[-1:], slots))
        cache.index_copy_(2, self.slot(position[left], slots), new[:, :, left])
        return met

    def attend(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, query_T: Tensor, key_S: Tensor
    ) -> Tensor:
        past = k_BHSK.shape[2] - q_BHTK.shape[2]
        if past == 0 and self.kept == 0:
            return self.attend_by_block(q_BHTK, k_BHSK, v_BHSV)
        return self.masked(q_BHTK, k_BHSK, v_BHSV, self.sees(query_T, key_S), q_BHTK.shape[3] ** -0.5)

    def attend_by_block(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor) -> Tensor:
        """Blocks that see nothing of one another, as sequences of their own."""
        batch, _, length, _ = q_BHTK.shape
        count = -(-length // self.size)
        folded = []
        for x_BHTK in (q_BHTK, k_BHSK, v_BHSV):
            padded = F.pad(x_BHTK, (0, 0, 0, count * self.size - length))
            folded.append(torch.unflatten(padded, 2, (count, self.size)).transpose(1, 2).flatten(0, 1))
        place = torch.arange(self.size, device=q_BHTK.device)
        seen = place <= place[:, None]
        o = self.masked(folded[0], folded[1], folded[2], seen, q_BHTK.shape[3] ** -0.5)
        o_BHTV: Tensor = torch.unflatten(o, 0, (batch, count)).transpose(1, 2).flatten(2, 3)
        return o_BHTV[:, :, :length]


def strided_slots(capacity: int, block: int, kept: int, near: bool) -> int:
    """Slots of a cache for `capacity` tokens: those that pass, then those that are kept."""
    whole, rest = divmod(capacity, block)
    passing = min(block - kept if near else 1, capacity)
    return passing + whole * kept + max(0, rest - (block - kept))


def strided_pairs(length: int, block: int, kept: int) -> int:
    """Pairs that `attend` computes in the torch form for a sequence without a past, masked ones included."""
    return length * length if kept else -(-length // block) * block**2
