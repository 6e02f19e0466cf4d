"""Attention that keeps the tokens of a window, and of those that left it the few that score best: constant memory.

    r_s = CNN_h([k_{s-6}, v_{s-6}] .. [k_s, v_s], .., [k_{s+3}, v_{s+3}])        one number for each head of keys
    t sees s where t - s < W, or where s is among the M tokens of highest r that are W or more behind t

The CNN has three layers of three taps, the last of which end three tokens after s, and then one number: no token has
left the window before its score is known, so that a token depends on earlier ones alone. Who has been dropped once
never returns, as the best M of a longer past are among the best M of a shorter one and what was added. The earlier of
two tokens of equal score stays; with sinks, the first tokens of the sequence are better than all others.

Choosing passes no gradient, so values carry it: v_s (1 + (sigmoid(r_s) - [sigmoid(r_s)])), [.] being constant, is v_s,
and its gradient by the score that of a value that the score had multiplied.

Source: He and Garner 2025 (LTE, arXiv 2510.20787) and its public code: keys before they are turned, layers of 2K, K,
K/2 and K/4 channels with SiLU, and the gradient.

Departures: M bounds who is kept in training too, where the paper lets in all scores above zero, draws them down by a
loss and applies the bound afterwards; so there is neither a threshold nor that loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.attention import attend
from mixforge.search_space.parts.attention_heads import Output, Queries
from mixforge.search_space.parts.attention_memory import KeysValues
from mixforge.search_space.parts.attention_position import Position, turned
from mixforge.search_space.parts.layer import Pass, TokenMixer

State = dict[str, Tensor]

TAPS = 3
LAYERS = 3
# Tokens between one and the last that its score reads.
DELAY = LAYERS * (TAPS - 1) // 2


def score_channels(head_dim: int) -> list[int]:
    """Of the inputs of each layer, and of what the last one gives."""
    return [max(1, 2 * head_dim >> layer) for layer in range(LAYERS + 1)]


class TokenScores(nn.Module):
    """Convolutions over the keys and values of each head, in float32 or better: [B, H, T, 2 K] -> [B, H, T].

    What comes out beside a token is the score of the one `DELAY` tokens before.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        sizes = score_channels(head_dim)
        self.heads = heads
        self.sizes = sizes[:-1]
        self.weights = nn.ParameterList(
            torch.randn(heads, TAPS * into, out) * math.sqrt(2 / (TAPS * into))
            for into, out in pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(heads, 1, out) for out in sizes[1:])
        self.score = nn.Parameter(torch.randn(heads, sizes[-1], 1) * math.sqrt(2 / sizes[-1]))

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """The last inputs of each layer."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            f"taps_{layer}": torch.zeros(batch, self.heads, TAPS - 1, size, device=device, dtype=exact)
            for layer, size in enumerate(self.sizes)
        }

    def forward(self, x_BHTK: Tensor, state: State | None) -> Tensor:
        """The state is brought up to date in place."""
        x = x_BHTK if x_BHTK.dtype == torch.float64 else x_BHTK.float()
        length = x.shape[2]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if state is None:
                padded = F.pad(x, (0, 0, TAPS - 1, 0))
            else:
                padded = torch.cat([state[f"taps_{layer}"], x], 2)
                state[f"taps_{layer}"].copy_(padded[:, :, -(TAPS - 1) :])
            taps = torch.cat([padded[:, :, tap : tap + length] for tap in range(TAPS)], 3)
            x = F.silu(taps @ weight.to(x.dtype) + bias.to(x.dtype))
        return (x @ self.score.to(x.dtype))[..., 0]


class EvictingAttention(TokenMixer):
    """A cache of [B, heads, slots, ...]: a ring of the window's tokens, and behind it the kept ones in any order."""

    def __init__(
        self,
        window: int,
        budget: int,
        sinks: int,
        queries: Queries,
        memory: KeysValues,
        position: Position,
        scores: TokenScores,
        output: Output,
        masked: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor],
    ) -> None:
        super().__init__()
        self.window = window
        self.budget = budget
        self.sinks = sinks
        self.queries = queries
        self.memory = memory
        self.position = position
        self.scores = scores
        self.output = output
        self.masked = masked
        self.scale = memory.head_dim**-0.5

    def initial_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> State:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (batch, self.memory.heads, evicting_slots(capacity, self.window, self.budget))
        return {
            "key": torch.zeros(*shape, self.memory.head_dim, device=device, dtype=dtype),
            "value": torch.zeros(*shape, self.memory.head_dim, device=device, dtype=dtype),
            # A slot behind the ring with this score is empty.
            "score": torch.full((*shape, 1), -torch.inf, device=device, dtype=exact),
            "place": torch.full((*shape, 1), -1, device=device, dtype=torch.int32),
            **self.memory.initial_state(batch, device, dtype),
            **self.position.initial_state(batch, device, dtype),
            **self.scores.initial_state(batch, device, dtype),
        }

    def forward(self, x_BTD: Tensor, state: State | None, at: Pass) -> tuple[Tensor, State | None]:
        tokens, ask_BHTK, score_BHT = self.read(x_BTD, state, at)
        start, length = at.start, x_BTD.shape[1]
        first, kept = start, 0
        if state is not None:
            earlier, first, kept = self.earlier(state, start)
            tokens = {name: torch.cat([earlier[name], tokens[name]], 2) for name in tokens}
        score_BHS = tokens["score"][..., 0].clone()
        # The scores that come out beside this pass's tokens are of tokens a little earlier.
        known = score_BHT[:, :, max(0, DELAY - start) :]
        begin = kept + max(start - DELAY, 0) - first
        score_BHS[:, :, begin : begin + known.shape[2]] = known
        place_BHS = tokens["place"][..., 0]
        score_BHS = score_BHS.masked_fill((place_BHS >= 0) & (place_BHS < self.sinks), torch.inf)
        gate_BHS1 = score_BHS.sigmoid()[..., None].to(x_BTD.dtype)
        v_BHSV = tokens["value"] * (1 + (gate_BHS1 - gate_BHS1.detach()))
        left_T = (at.positions_T - self.window + 1 - first).clamp(min=0) + kept
        seen = self.seen(score_BHS.detach(), left_T, kept, first, at.positions_T)
        group = ask_BHTK.shape[1] // seen.shape[1]
        o_BHTV = self.masked(ask_BHTK, tokens["key"], v_BHSV, seen.repeat_interleave(group, 1), self.scale)
        if state is not None:
            tokens["score"] = score_BHS[..., None]
            self.store(state, tokens, start + length, first, kept)
        return self.output(o_BHTV, x_BTD), state

    def step(self, x_BD: Tensor, state: State, at: Pass) -> tuple[Tensor, State]:
        x_BTD = x_BD[:, None]
        tokens, ask_BHTK, score_BH1 = self.read(x_BTD, state, at)
        slots = state["key"].shape[2]
        ring = min(self.window, slots)
        scored = at.positions_T - DELAY
        score_BH1 = score_BH1.masked_fill(scored < self.sinks, torch.inf)
        state["score"].index_copy_(2, scored % ring, score_BH1[..., None])
        here = at.positions_T % ring
        if slots > ring:
            self.keep(state, here, ring, at.positions_T)
        for name in ("key", "value", "place"):
            state[name].index_copy_(2, here, tokens[name])
        slot = torch.arange(slots, device=x_BD.device)
        is_near = (slot < ring) & (slot <= at.positions_T)
        seen = is_near | ((slot >= ring) & (state["score"][..., 0] > -torch.inf))
        seen = seen[:, :, None].repeat_interleave(ask_BHTK.shape[1] // seen.shape[1], 1)
        o_BHTV = attend(ask_BHTK, state["key"], state["value"], seen, scale=self.scale)
        return self.output(o_BHTV, x_BTD)[:, 0], state

    def read(self, x_BTD: Tensor, state: State | None, at: Pass) -> tuple[State, Tensor, Tensor]:
        """The tokens as they are cached, but for their scores; queries; what the scores' layers give beside them."""
        angle = self.position.angles(x_BTD, at.positions_T, state)
        visible_T = (at.positions_T + 1).clamp(max=self.window + self.budget)
        ask_BHTK = self.queries(x_BTD, angle, visible_T, None)
        k_BTHK, v_BTHV = self.memory.make(x_BTD, state)
        score_BHT = self.scores(torch.cat([k_BTHK, v_BTHV], 3).transpose(1, 2), state)
        place_BHT1 = at.positions_T[:, None].to(torch.int32).expand(*score_BHT.shape, 1)
        tokens = {
            "key": turned(k_BTHK, angle).transpose(1, 2),
            "value": v_BTHV.transpose(1, 2),
            "score": torch.zeros_like(score_BHT)[..., None],
            "place": place_BHT1,
        }
        return tokens, ask_BHTK, score_BHT

    def seen(self, score_BHS: Tensor, left_T: Tensor, kept: int, first: int, positions_T: Tensor) -> Tensor:
        """[B, H, T, S] over tokens in order, the `kept` ones and then all from `first` on.

        left_T: how many of these have left each query's window.
        """
        item = torch.arange(score_BHS.shape[2], device=score_BHS.device)
        place = item - kept + first
        is_near = (item >= left_T[:, None]) & (place <= positions_T[:, None])
        # [.., U, S], True where U comes before S; then for each S how many do so among the first tokens.
        high, low = score_BHS[..., :, None], score_BHS[..., None, :]
        is_ahead = (high > low) | ((high == low) & (item[:, None] < item))
        ahead = F.pad(is_ahead.cumsum(2, dtype=torch.int32), (0, 0, 1, 0)).index_select(2, left_T)
        is_there = (score_BHS > -torch.inf)[:, :, None]
        return is_near | ((item < left_T[:, None]) & (ahead < self.budget) & is_there)

    def earlier(self, state: State, start: int) -> tuple[State, int, int]:
        """What is cached of the tokens before `start`, in order; the window's first token; how many are kept ones."""
        slots = state["key"].shape[2]
        ring = min(self.window, slots)
        first = max(0, start - ring)
        near = torch.arange(first, start, device=state["key"].device) % ring
        order = state["place"][:, :, ring:].argsort(2)
        found = {}
        for name in ("key", "value", "score", "place"):
            behind = state[name][:, :, ring:]
            in_order = behind.gather(2, order.expand(-1, -1, -1, behind.shape[3]))
            found[name] = torch.cat([in_order, state[name].index_select(2, near)], 2)
        return found, first, slots - ring

    def store(self, state: State, tokens: State, end: int, first: int, kept: int) -> None:
        """Cache what the tokens before `end` leave: the last of them in the ring, the best of the others behind it."""
        slots = state["key"].shape[2]
        ring = min(self.window, slots)
        near = torch.arange(max(0, end - ring), end, device=state["key"].device)
        left = kept + max(0, end - self.window - first)
        score = tokens["score"][:, :, :left]
        order = score.sort(dim=2, descending=True, stable=True).indices[:, :, : slots - ring]
        for name in ("key", "value", "score", "place"):
            best = tokens[name].gather(2, order.expand(-1, -1, -1, tokens[name].shape[3]))
            state[name][:, :, ring : ring + best.shape[2]] = best
            state[name].index_copy_(2, near % ring, tokens[name][:, :, tokens[name].shape[2] - len(near) :])

    def keep(self, state: State, here: Tensor, ring: int, position: Tensor) -> None:
        """Put the token that leaves the window in the place of the last of the kept ones, if it comes before that."""
        score, place = state["score"][:, :, ring:], state["place"][:, :, ring:]
        least = score.amin(2, keepdim=True)
        last = torch.where(score == least, place, -2).argmax(2, keepdim=True)
        enters = (position >= ring) & (state["score"].index_select(2, here) > least)
        for name in ("key", "value", "score", "place"):
            slot = (ring + last).expand(-1, -1, -1, state[name].shape[3])
            old, new = state[name].gather(2, slot), state[name].index_select(2, here)
            state[name].scatter_(2, slot, torch.where(enters, new, old))


def evicting_slots(capacity: int, window: int, budget: int) -> int:
    """Slots of a cache for `capacity` tokens."""
    return min(capacity, window + budget)
