"""Patterns of attention that go by blocks of tokens: who sees whom follows from positions, or from the blocks' means.

    strided(l)    t - s < l, or l divides t - s
    fixed(l, c)   s in the block of t, or among the last c tokens of its own block
    chunk(l)      s in the block of t
    boundaries    s the last token of its block, or t - s < n

Blocks are of l tokens from the sequence's start.

Sources: Child et al. 2019 (arXiv 1904.10509), section 4.2, for strided and fixed patterns, with both index sets in every
head (its "merged" heads, section 5.1); boundaries with n = 1, which are checkpoints, one for each segment, as in the
compressed attention of Jafari et al. 2025 (SCOUT, arXiv 2509.00935), and with n leading tokens as in Akhauri et al.
2024 (Attamba, arXiv 2411.17685).
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


class SharedSlots(Pattern):
    """Patterns whose tokens share slots, of which the last to be written holds. Abstract."""

    def extend(self, cache: Tensor, new: Tensor, start: int) -> Tensor:
        slots, end = cache.shape[2], start + new.shape[2]
        past = self.meets(start, 0, new.device)
        met = torch.cat([cache[:, :, self.slot(past, slots)], new], 2) if start > 0 else new
        position = torch.arange(start, end, device=new.device)
        # Of the tokens that pass, only those that are left at the end are written: no slot is written twice.
        left = torch.isin(position, self.held(position[-1:], slots))
        cache.index_copy_(2, self.slot(position[left], slots), new[:, :, left])
        return met


class Blocks(SharedSlots):
    """All tokens of one's own block up to oneself, and the last `kept` tokens of every earlier block.

    Of a cache, the tokens that are not kept share the first slots, which begin anew with each block; the kept ones
    have slots of their own behind them.
    """

    def __init__(self, block: int, kept: int, masked: Masked) -> None:
        super().__init__()
        self.size = block
        self.kept = kept
        self.masked = masked
        self.passing = block - kept

    def is_kept(self, position: Tensor) -> Tensor:
        return position % self.size >= self.size - self.kept

    def sees(self, query_T: Tensor, key_S: Tensor) -> Tensor:
        query_T1 = query_T[:, None]
        own = key_S // self.size == query_T1 // self.size
        return (key_S <= query_T1) & (key_S >= 0) & (self.is_kept(key_S) | own)

    def visible(self, query_T: Tensor) -> Tensor:
        return query_T // self.size * self.kept + query_T % self.size + 1

    def slots(self, capacity: int) -> int:
        return strided_slots(capacity, self.size, self.kept)

    def slot(self, positions_T: Tensor, slots: int) -> Tensor:
        offset = positions_T % self.size
        behind = min(self.passing, slots) + positions_T // self.size * self.kept
        return torch.where(self.is_kept(positions_T), behind + offset - (self.size - self.kept), offset)

    def held(self, position: Tensor, slots: int) -> Tensor:
        slot = torch.arange(slots, device=position.device)
        first = position // self.size * self.size
        passing = torch.where(first + slot <= position, first + slot, first + slot - self.size)
        number = slot - min(self.passing, slots)
        kept = torch.full_like(slot, -1)
        if self.kept > 0:
            kept = number // self.kept * self.size + self.size - self.kept + number % self.kept
            kept = torch.where(kept <= position, kept, -1)
        return torch.where(number < 0, passing.clamp(min=-1), kept)

    def meets(self, start: int, length: int, device: torch.device) -> Tensor:
        past = torch.arange(start, device=device)
        own = past >= start // self.size * self.size
        return torch.cat([past[self.is_kept(past) | own], torch.arange(start, start + length, device=device)])

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


class Boundaries(SharedSlots):
    """The last token of every block, and the last `leading` tokens, oneself included.

    Of a cache, the tokens that are no boundary are a ring; the boundaries have slots of their own behind it.
    """

    def __init__(self, block: int, leading: int, masked: Masked) -> None:
        super().__init__()
        self.size = block
        self.leading = leading
        self.masked = masked

    def is_boundary(self, position: Tensor) -> Tensor:
        return position % self.size == self.size - 1

    def sees(self, query_T: Tensor, key_S: Tensor) -> Tensor:
        distance_TS = query_T[:, None] - key_S
        chosen = self.is_boundary(key_S) | (distance_TS < self.leading)
        return (distance_TS >= 0) & (key_S >= 0) & chosen

    def visible(self, query_T: Tensor) -> Tensor:
        near = (query_T + 1).clamp(max=self.leading)
        return near + (query_T + 1 - near) // self.size

    def slots(self, capacity: int) -> int:
        return boundary_slots(capacity, self.size, self.leading)

    def ring(self, slots: int) -> int:
        """Slots of tokens that are no boundary, of so many in all."""
        return min(self.leading - self.leading // self.size, slots - slots // self.size)

    def slot(self, positions_T: Tensor, slots: int) -> Tensor:
        ring, before = self.ring(slots), positions_T // self.size
        return torch.where(
            self.is_boundary(positions_T), ring + before, (positions_T - before) % max(1, ring)
        )

    def held(self, position: Tensor, slots: int) -> Tensor:
        slot, ring = torch.arange(slots, device=position.device), self.ring(slots)
        # By their number among the tokens that are no boundary.
        last = position - (position + 1) // self.size
        number = last - (last - slot) % max(1, ring)
        passing = number // (self.size - 1) * self.size + number % (self.size - 1)
        boundary = (slot - ring + 1) * self.size - 1
        found = torch.where(slot < ring, passing, boundary)
        return torch.where((found >= 0) & (found <= position), found, -1)

    def meets(self, start: int, length: int, device: torch.device) -> Tensor:
        past = torch.arange(start, device=device)
        seen = self.is_boundary(past) | (past > start - self.leading)
        return torch.cat([past[seen], torch.arange(start, start + length, device=device)])

    def attend(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, query_T: Tensor, key_S: Tensor
    ) -> Tensor:
        return self.masked(q_BHTK, k_BHSK, v_BHSV, self.sees(query_T, key_S), q_BHTK.shape[3] ** -0.5)


def strided_slots(capacity: int, block: int, kept: int) -> int:
    """Slots of a cache of `Blocks` for `capacity` tokens: those that pass, then those that are kept."""
    whole, rest = divmod(capacity, block)
    return min(block - kept, capacity) + whole * kept + max(0, rest - (block - kept))


def boundary_slots(capacity: int, block: int, leading: int) -> int:
    """Slots of a cache of `Boundaries` for `capacity` tokens: of any n in a row, at least n // block are boundaries."""
    boundaries = capacity // block
    return min(leading - leading // block, capacity - boundaries) + boundaries


def strided_pairs(length: int, block: int, kept: int) -> int:
    """Pairs that `Blocks` computes in the torch form for a sequence without a past, masked ones included."""
    return length * length if kept else -(-length // block) * block**2
