"""Avey: tokens mix with those of their split and of the past splits that are most like them, weighed by likeness.

    z_t = relu(W_e x_t)^2 = (a_t, g_t, b_t)                                        enricher
    c_t = sum_j P[t, j] cos(a_t, a_j) r_j^2 a_j,  j in the chosen splits and in its own up to t     contextualiser
    y_t = W_f (c_t * g_t, b_t)                                                     fuser

The sequence is cut into splits of L tokens. Ranker: split s is worth sum_q max_{j in s} cos(x_q, x_j) to the tokens q
of the query split; the best k - 1 are chosen, in their order, and r is a split's worth over that of the best, no less
than 0. P [L, kL] is learned by place, its last L columns those of the split itself.

Source: Hammoud and Acharya 2025 (arXiv 2506.11305), section 3, and its public code, whose ranker multiplies a chosen
split's inputs by r: relu^2 makes r^2 of that, and a cosine nothing.

Departures: the paper ranks by the split itself, whose first tokens so depend on its last; here the query is the split
before, which is complete and always its own best. The paper ranks once, on embeddings, and takes the chosen splits
through all layers; here each layer ranks its own inputs. There are no biases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.expansion import WIDEST, hidden_width, shortest_expand
from mixforge.search_space.genes import Real, Whole
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer

LEAST_EXPAND = 0.5
LEAST_CONTEXT = 0.125
# Of a token's likeness: worth is told apart by no less.
LEVELS = 1024


@dataclass(frozen=True, slots=True)
class Avey(Mixer):
    """Avey's ranker and neural processor. Genes: tokens of a split, splits that a token sees (its own among them),
    enriched channels over the width, and the share of them that takes part in mixing.
    """

    kind: ClassVar[Literal["token", "channel"]] = "token"

    split: Annotated[int, Whole(1, 1024)] = 64
    splits: Annotated[int, Whole(1, 64)] = 7
    expand: Annotated[int | float, Real(LEAST_EXPAND, WIDEST)] = 4
    context: Annotated[int | float, Real(LEAST_CONTEXT, 1)] = 0.5

    def sizes(self, width: int) -> tuple[int, int]:
        """Channels that mix (and as many that gate them), and channels that pass by."""
        hidden = hidden_width(self.expand, width)
        mixing = channels_that_mix(hidden, self.context)
        return mixing, hidden - 2 * mixing

    def why_illegal(self, width: int) -> str | None:
        if hidden_width(self.expand, width) < 2:
            return f"expand={self.expand} leaves one channel, and mixing takes two (mixer avey); say more"
        return None

    def canonical(self, width: int) -> Self:
        expand = shortest_expand(self.expand, width, LEAST_EXPAND)
        return replace(self, expand=expand, context=self._shortest_context(width))

    def _shortest_context(self, width: int) -> int | float:
        """The default or the share with the fewest digits that mixes as many channels."""
        mixing, passing = self.sizes(width)
        hidden = 2 * mixing + passing
        if channels_that_mix(hidden, 0.5) == mixing:
            return 0.5
        for digits in range(8):
            for short in (round(2 * mixing / hidden, digits), round((2 * mixing + 1) / hidden, digits)):
                if LEAST_CONTEXT <= short <= 1 and channels_that_mix(hidden, short) == mixing:
                    return int(short) if short.is_integer() else short
        return LEAST_CONTEXT if channels_that_mix(hidden, LEAST_CONTEXT) == mixing else self.context

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        mixing, passing = self.sizes(width)
        place = self.split * self.split * self.splits
        products = width * (2 * mixing + passing) + (mixing + passing) * width
        blocks = -(-length // self.split)
        chosen = min(self.splits, blocks) - 1
        ranked = (blocks - 1) * self.split if chosen > 0 else 0
        pairs = blocks * self.split * self.split * (1 + chosen)
        slot = (width + mixing) * itemsize
        # Worth of each split in float32; places and weights of the chosen ones.
        choice = 12 * (self.splits - 1)
        after = length // self.split + 1
        return Cost(
            params=products + place,
            flops=2 * length * products + 2 * ranked * ranked * width + 4 * pairs * mixing,
            state_bytes=blocks * self.split * slot + 4 * blocks + choice,
            decode_bytes=(products + self.split * self.splits) * itemsize
            + blocks * self.split * slot
            + 4 * blocks
            + choice
            + slot
            + 4 * after
            + (choice if length % self.split == 0 else 0),
            # A token has one row of the places.
            idle_params=place - self.split * self.splits,
        )

    def build(self, width: int, backend: Backend) -> Part:
        mixing, passing = self.sizes(width)
        return Part(
            NeuralProcessor,
            width=width,
            mixing=mixing,
            passing=passing,
            split=self.split,
            splits=self.splits,
        )


def channels_that_mix(hidden: int, context: int | float) -> int:
    """Of so many enriched channels."""
    return max(1, int(hidden * context / 2))


class NeuralProcessor(TokenMixer):
    """[B, T, D] -> [B, T, D].

    The state has all inputs and all mixing channels, what each split is worth to the present one, and the chosen ones.
    """

    def __init__(self, width: int, mixing: int, passing: int, split: int, splits: int) -> None:
        super().__init__()
        self.width = width
        self.sizes = [mixing, mixing, passing]
        self.split = split
        self.splits = splits
        self.enricher = Dense(width, 2 * mixing + passing, bias=False)
        self.place = nn.Parameter(nn.init.xavier_normal_(torch.empty(split, splits * split)))
        self.out = Dense(mixing + passing, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        blocks = -(-capacity // self.split)
        float_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        slots = blocks * self.split
        return {
            "input": torch.zeros(batch, slots, self.width, device=device, dtype=dtype),
            "mixing": torch.zeros(batch, slots, self.sizes[0], device=device, dtype=dtype),
            "worth": torch.zeros(batch, blocks, device=device, dtype=float_dtype),
            "chosen": torch.zeros(batch, self.splits - 1, device=device, dtype=torch.int64),
            "weight": torch.zeros(batch, self.splits - 1, device=device, dtype=float_dtype),
        }

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        a_BTA, gate_BTA, b_BTF = self._enriched(x_BTD)
        seen_BTD, seen_BTA, first = x_BTD, a_BTA, 0
        if state is not None:
            state["input"].index_copy_(1, at.positions_T, x_BTD)
            state["mixing"].index_copy_(1, at.positions_T, a_BTA)
            end, first = at.start + x_BTD.shape[1], at.start // self.split
            seen_BTD, seen_BTA = state["input"][:, :end], state["mixing"][:, :end]
        c_BTA, chosen, weight = self._contexts(seen_BTD, seen_BTA, first)
        c_BTA = c_BTA[:, at.start - first * self.split :][:, : x_BTD.shape[1]]
        if state is not None:
            state = {**state, **self._choice(seen_BTD, chosen, weight, state)}
        return self.out(torch.cat([c_BTA * gate_BTA, b_BTF], -1)), state

    def _enriched(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channels that mix, their gates, and those that pass by."""
        a, gate, passing = torch.split(F.relu(self.enricher(x)).square(), self.sizes, -1)
        return a, gate, passing

    def _contexts(
        self, x_BTD: Tensor, a_BTA: Tensor, first: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """c of all tokens from split `first` on, and the chosen splits of each split and their weights."""
        batch, length, _ = x_BTD.shape
        blocks = -(-length // self.split)
        a_BNLA = F.pad(a_BTA, (0, 0, 0, blocks * self.split - length)).view(batch, blocks, self.split, -1)
        own = a_BNLA[:, first:]
        wide = (self.splits - 1) * self.split
        likeness = unit(own) @ unit(own).transpose(2, 3)
        c_BNLA = (self.place[:, wide:].tril() * likeness) @ own
        count = min(self.splits, blocks) - 1
        if count == 0:
            return c_BNLA.flatten(1, 2), None, None
        chosen, weight = self._ranked(x_BTD[:, : (blocks - 1) * self.split], first, count)
        index = chosen.flatten(1)[:, :, None, None].expand(-1, -1, *a_BNLA.shape[2:])
        past = a_BNLA.gather(1, index).view(batch, blocks - first, count * self.split, -1)
        scale = weight.square().repeat_interleave(self.split, -1)[:, :, None].to(past.dtype)
        likeness = unit(own) @ unit(past).transpose(2, 3)
        c_BNLA = c_BNLA + (self.place[:, wide - count * self.split : wide] * likeness * scale) @ past
        return c_BNLA.flatten(1, 2), chosen, weight

    def _ranked(self, x_BTD: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """For each split from `first` on, the best splits before it, of complete splits: [B, N, count]."""
        units = F.normalize(exact(x_BTD), dim=-1, eps=1e-8)
        blocks = x_BTD.shape[1] // self.split
        query = units[:, max(0, first - 1) * self.split :]
        worth = self._worth(query @ units.transpose(1, 2))
        worth = worth.view(len(worth), -1, self.split, blocks).sum(2)
        queries = torch.arange(max(0, first - 1), blocks, device=x_BTD.device)
        is_later = torch.arange(blocks, device=x_BTD.device) > queries[:, None]
        worth = worth.masked_fill(is_later, -torch.inf)
        if first == 0:
            worth = F.pad(worth, (0, 0, 1, 0), value=-torch.inf)
        return best(worth, count)

    def _worth(self, likeness_BQT: Tensor) -> Tensor:
        """The most like token of each split: [B, Q, S]."""
        batch, queries, _ = likeness_BQT.shape
        return likeness_BQT.view(batch, queries, -1, self.split).amax(-1)

    def _choice(
        self, x_BTD: Tensor, chosen: Tensor | None, weight: Tensor | None, state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the last split has chosen, and what every split is worth to its tokens so far."""
        blocks = -(-x_BTD.shape[1] // self.split)
        units = F.normalize(exact(state["input"][:, : blocks * self.split]), dim=-1, eps=1e-8)
        query = units[:, (blocks - 1) * self.split : x_BTD.shape[1]]
        worth = self._worth(query @ units.transpose(1, 2)).sum(1)
        worth = F.pad(worth, (0, state["worth"].shape[1] - blocks))
        if chosen is None or weight is None:
            return {"worth": worth}
        absent = self.splits - 1 - chosen.shape[2]
        return {
            "worth": worth,
            "chosen": F.pad(chosen[:, -1], (absent, 0)),
            "weight": F.pad(weight[:, -1], (absent, 0)),
        }

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        a_BA, gate_BA, b_BF = self._enriched(x_BD)
        position = at.positions_T
        state["input"].index_copy_(1, position, x_BD[:, None])
        state["mixing"].index_copy_(1, position, a_BA[:, None])
        blocks = state["worth"].shape[1]
        split_S, here = torch.arange(blocks, device=x_BD.device), position // self.split
        is_new = position % self.split == 0
        count = min(self.splits - 1, blocks)
        if count > 0:
            chosen, weight = best(state["worth"].masked_fill(split_S >= here, -torch.inf), count)
            absent = self.splits - 1 - count
            state["chosen"].copy_(torch.where(is_new, F.pad(chosen, (absent, 0)), state["chosen"]))
            state["weight"].copy_(torch.where(is_new, F.pad(weight, (absent, 0)), state["weight"]))
        units = F.normalize(exact(state["input"]), dim=-1, eps=1e-8)
        query = F.normalize(exact(x_BD), dim=-1, eps=1e-8)
        likeness_BT = (units * query[:, None]).sum(-1)
        is_later = torch.arange(units.shape[1], device=x_BD.device) > position
        worth = self._worth(likeness_BT.masked_fill(is_later, -torch.inf)[:, None])[:, 0]
        worth = torch.where(split_S <= here, worth, 0)
        state["worth"].copy_(worth + torch.where(is_new, 0, state["worth"]))
        c_BA = self._context(a_BA, state, position)
        return self.out(torch.cat([c_BA * gate_BA, b_BF], -1)), state

    def _context(self, a_BA: Tensor, state: dict[str, Tensor], position: Tensor) -> Tensor:
        """c of one token: its row of places over the chosen splits and its own."""
        token_L = torch.arange(self.split, device=a_BA.device)
        blocks = state["worth"].shape[1]
        # A state that holds no choice yet may hold anything; its weights are zero.
        past = state["chosen"].clamp(0, blocks - 1)[:, :, None] * self.split + token_L
        own = (position // self.split * self.split + token_L).expand(a_BA.shape[0], 1, -1)
        index = torch.cat([past, own], 1).flatten(1)[:, :, None].expand(-1, -1, a_BA.shape[1])
        seen = state["mixing"].gather(1, index)
        scale = state["weight"].square().repeat_interleave(self.split, -1)
        is_seen = (token_L <= position % self.split).to(scale.dtype).expand(a_BA.shape[0], -1)
        row = self.place[position % self.split] * torch.cat([scale, is_seen], 1).to(a_BA.dtype)
        likeness = (unit(seen) * unit(a_BA)[:, None]).sum(-1)
        return ((row * likeness)[:, :, None] * seen).sum(1)


def best(worth: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places of the `count` largest in their order, and their shares of the largest; absent ones first, share 0."""
    # Tokens that come again make splits of one worth but for rounding, which is another in a step than in a sequence:
    # of those that differ by less, the later ones are taken.
    blocks = worth.shape[-1]
    level = (worth.double() * LEVELS).round() * blocks + torch.arange(blocks, device=worth.device)
    index = level.topk(count, -1).indices
    value = worth.gather(-1, index)
    is_there = value > -torch.inf
    value = torch.where(is_there, value, 0)
    share = (value / worth.amax(-1, keepdim=True).clamp(min=1e-8)).clamp(min=0)
    index, order = torch.where(is_there, index, -1).sort(dim=-1)
    return index.clamp(min=0), share.gather(-1, order)


def unit(a: Tensor) -> Tensor:
    """Of length 1 over the last axis; zeros stay zeros."""
    return a / (a.square().sum(-1, keepdim=True) + 1e-8).sqrt()
