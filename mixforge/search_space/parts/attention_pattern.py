"""Who sees whom in attention, and where a token's keys and values are kept for as long as somebody sees them.

    every earlier token        s <= t
    a window of W tokens       t - s < W
    a dilated window           t - s < (W - 1) d + 1 and d divides t - s
    with first tokens          as a window, and s < n
    a prefix of n tokens       s <= t or s < n, of the tokens that a sequence's first pass brings

A pattern answers for every way of running the same attention: which pairs are seen (`sees`, by the tokens'
positions), how many keys a query sees (`visible`), which slot of a cache a token has (`slot`) and which token a slot
holds (`held`), which keys a pass over a sequence meets (`meets`, `extend`) and how softmax attention over it is
computed fast (`attend`). A new pattern is a class beside these; one whose choice depends on content is handed queries
and keys by `attend`.

Sources: Beltagy et al. 2020 (arXiv 2004.05150), section 3.1, for windows and dilated windows; Jiang et al. 2023
(arXiv 2310.06825), section 2, for the ring; Xiao et al. 2023 (arXiv 2309.17453), section 3.2, for the first tokens
that stay in sight; Cabannes et al. 2025 (arXiv 2509.24552) for windows whose size is drawn anew for each batch of
training; Raffel et al. 2019 (arXiv 1910.10683), section 3.2.1 and figure 3, for a prefix that is read together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.attention import attended_pairs
from mixforge.search_space.parts.layer import Pass


class Pattern(nn.Module):
    """Abstract. Positions are int64 tensors; a key's position below 0 says that its slot is empty."""

    def slots(self, capacity: int) -> int:
        """Slots of a cache for `capacity` tokens."""
        raise NotImplementedError

    def sees(self, query_T: Tensor, key_S: Tensor) -> Tensor:
        """[T, S], True where a query sees a key."""
        raise NotImplementedError

    def choose(self, q_BHTK: Tensor, k_BHSK: Tensor, query_T: Tensor, key_S: Tensor) -> Tensor:
        """As `sees`, where queries and keys have a say in it: [T, S] or [B, H, T, S]."""
        return self.sees(query_T, key_S)

    def visible(self, query_T: Tensor) -> Tensor:
        """[T], how many keys each query sees."""
        raise NotImplementedError

    def slot(self, positions_T: Tensor, slots: int) -> Tensor:
        """The slot of each token."""
        raise NotImplementedError

    def held(self, position: Tensor, slots: int) -> Tensor:
        """[slots], the token in each slot once the token at `position` [1] is written."""
        raise NotImplementedError

    def meets(self, start: int, length: int, device: torch.device) -> Tensor:
        """The tokens whose keys `extend` returns for a pass over `length` tokens from `start` on."""
        raise NotImplementedError

    def extend(self, cache: Tensor, new: Tensor, start: int) -> Tensor:
        """Write entries [B, H, T, ...] of the tokens from `start` on. Returns those of the tokens that are met."""
        raise NotImplementedError

    def block(self, length: int) -> int | None:
        """Tokens of a block that sees itself and the block before alone; None where that saves nothing."""
        return None

    def last(self, length: int) -> int | None:
        """How many of the last tokens each of so many sees, where it sees these alone; None where it does not."""
        return None

    def attend(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, query_T: Tensor, key_S: Tensor
    ) -> Tensor:
        """Softmax attention of a pass over a sequence, scores divided by sqrt(K): [B, H, T, V]."""
        raise NotImplementedError

    def prepare(self, at: Pass, training: bool) -> None:
        """Called before each pass over a sequence; `training` where it trains."""


class EveryTokenKept(Pattern):
    """Patterns that keep all tokens, in the order of their positions. Abstract."""

    def slots(self, capacity: int) -> int:
        return capacity

    def slot(self, positions_T: Tensor, slots: int) -> Tensor:
        return positions_T

    def held(self, position: Tensor, slots: int) -> Tensor:
        return torch.arange(slots, device=position.device)

    def meets(self, start: int, length: int, device: torch.device) -> Tensor:
        return torch.arange(start + length, device=device)

    def extend(self, cache: Tensor, new: Tensor, start: int) -> Tensor:
        end = start + new.shape[2]
        cache[:, :, start:end] = new
        return new if start == 0 else cache[:, :, :end]


class EveryToken(EveryTokenKept):
    """Every earlier token and itself."""

    def __init__(self, operation: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def sees(self, query_T: Tensor, key_S: Tensor) -> Tensor:
        return (key_S <= query_T[:, None]) & (key_S >= 0)

    def visible(self, query_T: Tensor) -> Tensor:
        return query_T + 1

    def last(self, length: int) -> int | None:
        return length

    def attend(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, query_T: Tensor, key_S: Tensor
    ) -> Tensor:
        return self.operation(q_BHTK, k_BHSK, v_BHSV, k_BHSK.shape[2] - q_BHTK.shape[2])


class EveryTokenAndPrefix(EveryTokenKept):
    """Every earlier token and itself, and of the tokens of a sequence's first pass the first `length`.

    In later passes, and in steps, it is every earlier token: a shorter first pass makes a shorter prefix.
    """

    def __init__(
        self,
        length: int,
        operation: Callable[[Tensor, Tensor, Tensor, int], Tensor],
        later: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    ) -> None:
        super().__init__()
        self.length = length
        self.operation = operation
        self.later = later
        # Tokens that this pass reads together. A step is a pass over one token, wherever it stands.
        self.together = 0

    def prepare(self, at: Pass, training: bool) -> None:
        self.together = min(self.length, len(at.positions_T)) if at.start == 0 else 0

    def sees(self, query_T: Tensor, key_S: Tensor) -> Tensor:
        return ((key_S <= query_T[:, None]) | (key_S < self.together)) & (key_S >= 0)

    def visible(self, query_T: Tensor) -> Tensor:
        return (query_T + 1).clamp(min=self.together)

    def attend(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, query_T: Tensor, key_S: Tensor
    ) -> Tensor:
        if self.together:
            return self.operation(q_BHTK, k_BHSK, v_BHSV, self.together)
        return self.later(q_BHTK, k_BHSK, v_BHSV, k_BHSK.shape[2] - q_BHTK.shape[2])


class Window(Pattern):
    """The last `window` tokens at distances that `dilation` divides, its own included, and the `first` tokens of the
    sequence. With `shorter`, each pass of training takes one of the two windows, each half of the time.

    The first tokens have slots of their own; behind them is a ring.
    """

    def __init__(
        self,
        window: int,
        dilation: int,
        first: int,
        shorter: int | None,
        operation: Callable[[Tensor, Tensor, Tensor, int, int], Tensor],
        masked: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor],
    ) -> None:
        super().__init__()
        self.window = window
        self.longest = window
        self.shorter = shorter
        self.dilation = dilation
        self.first = first
        self.operation = operation
        self.masked = masked

    @property
    def span(self) -> int:
        """Tokens from the farthest one in the window to itself."""
        return (self.window - 1) * self.dilation + 1

    def prepare(self, at: Pass, training: bool) -> None:
        self.window = self.longest
        if training and self.shorter is not None:
            # One draw for all layers of a pass, so that a batch has one window.
            draw = at.shared.setdefault("window", (torch.rand(()),))[0]
            self.window = self.shorter if float(draw) < 0.5 else self.longest

    def block(self, length: int) -> int | None:
        return block_size(length, self.span, self.first)

    def last(self, length: int) -> int | None:
        return self.window if self.dilation == 1 and self.first == 0 else None

    def slots(self, capacity: int) -> int:
        return min(capacity, self.first + self.span)

    def sees(self, query_T: Tensor, key_S: Tensor) -> Tensor:
        distance_TS = query_T[:, None] - key_S
        near = (distance_TS < self.span) & (distance_TS % self.dilation == 0)
        return (distance_TS >= 0) & (key_S >= 0) & (near | (key_S < self.first))

    def visible(self, query_T: Tensor) -> Tensor:
        near = (query_T // self.dilation + 1).clamp(max=self.window)
        if self.first == 0:
            return near
        # First tokens are counted once, those among them that the window sees as well not again.
        first = torch.arange(self.first, device=query_T.device)
        distance_TS = query_T[:, None] - first
        own = (distance_TS < self.span) & (distance_TS % self.dilation == 0)
        return near + ((distance_TS >= 0) & ~own).sum(1)

    def slot(self, positions_T: Tensor, slots: int) -> Tensor:
        # A cache for less tokens than the first ones has no ring, and no token that would go there.
        ring = self.first + (positions_T - self.first) % max(1, slots - self.first)
        return torch.where(positions_T < self.first, positions_T, ring)

    def held(self, position: Tensor, slots: int) -> Tensor:
        slot = torch.arange(slots, device=position.device)
        age = (position - slot) % max(1, slots - self.first)
        ring = torch.where(position - age >= self.first, position - age, -1)
        return torch.where(slot < self.first, slot, ring)

    def meets(self, start: int, length: int, device: torch.device) -> Tensor:
        first = torch.arange(min(self.first, start), device=device)
        near = torch.arange(max(len(first), start - self.span + 1), start + length, device=device)
        return torch.cat([first, near])

    def extend(self, cache: Tensor, new: Tensor, start: int) -> Tensor:
        slots, length = cache.shape[2], new.shape[2]
        past = self.meets(start, 0, new.device)
        met = torch.cat([cache[:, :, self.slot(past, slots)], new], 2) if start > 0 else new
        # Of the tokens behind the first ones, only the last are kept: no slot is written twice.
        position = torch.arange(start, start + length, device=new.device)
        behind = max(start, self.first, start + length - (slots - self.first)) - start
        for kept in (slice(0, max(0, self.first - start)), slice(behind, length)):
            cache.index_copy_(2, self.slot(position[kept], slots), new[:, :, kept])
        return met

    def attend(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, query_T: Tensor, key_S: Tensor
    ) -> Tensor:
        past = k_BHSK.shape[2] - q_BHTK.shape[2]
        if self.first == 0 and self.dilation == 1:
            return self.operation(q_BHTK, k_BHSK, v_BHSV, self.window, past)
        if self.first == 0 and past == 0:
            return self.attend_dilated(q_BHTK, k_BHSK, v_BHSV)
        return self.masked(q_BHTK, k_BHSK, v_BHSV, self.sees(query_T, key_S), q_BHTK.shape[3] ** -0.5)

    def attend_dilated(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor) -> Tensor:
        """Tokens of one remainder see one another alone: `dilation` sequences with a plain window each."""
        batch, _, length, _ = q_BHTK.shape
        short = -(-length // self.dilation)
        q, k, v = (self.folded(x_BHTK, short) for x_BHTK in (q_BHTK, k_BHSK, v_BHSV))
        o = torch.unflatten(self.operation(q, k, v, self.window, 0), 0, (batch, self.dilation))
        o_BHTV: Tensor = o.permute(0, 2, 3, 1, 4).flatten(2, 3)
        return o_BHTV[:, :, :length]

    def folded(self, x_BHTK: Tensor, short: int) -> Tensor:
        """[B d, H, T / d, K]: the remainders as sequences of their own."""
        padded = F.pad(x_BHTK, (0, 0, 0, short * self.dilation - x_BHTK.shape[2]))
        return torch.unflatten(padded, 2, (short, self.dilation)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def fused_pairs(length: int, window: int | None, dilation: int, first: int, prefix: int = 0) -> int:
    """Pairs that `attend` computes in the torch form for a sequence without a past, masked ones included."""
    if first > 0:
        return length * length
    if dilation == 1:
        return attended_pairs(length, window, prefix)
    return dilation * attended_pairs(-(-length // dilation), window)


def block_size(length: int, span: int, first: int) -> int | None:
    """Of blocks for a window that reaches over `span` tokens; None where they save nothing."""
    return span if first == 0 and length >= 4 * span else None
