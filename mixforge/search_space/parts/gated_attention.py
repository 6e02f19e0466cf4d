"""A gated attention unit: one head, queries and keys of one narrow vector, and gates as wide as the values.

`GatedAttentionUnit` has the projections and the gates, and hands z and v to an attention: `BlockAttention` over all
tokens or over those of one's own block, with `EarlierBlocks` for those before, or that of `gated_codes`.

Sources and equations: see `mixers.gau`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_scores import Weigh, attend_given
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.rotary import rotate

_THETA = 10000.0


class ScaleOffset(nn.Module):
    """a z + b, for queries or keys [B, T, K]; turned by the tokens' positions where that is asked for."""

    def __init__(self, channels: int, turns: bool) -> None:
        super().__init__()
        self.turns = turns
        self.scale = nn.Parameter(torch.randn(channels))
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, z_BTK: Tensor, positions_T: Tensor) -> Tensor:
        q_BTK = self.scale * z_BTK + self.offset
        return rotate(q_BTK[:, :, None], positions_T, _THETA)[:, :, 0] if self.turns else q_BTK


class DistanceBias(nn.Module):
    """What is added to the score of a query and a key at each distance below `reach`, and nothing beyond."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.weight = nn.Parameter(0.02 * torch.randn(reach))

    def forward(self, distance_TS: Tensor) -> Tensor:
        """[T, S] of distances, which are negative for keys that are not seen."""
        near_TS = (distance_TS >= 0) & (distance_TS < self.reach)
        return torch.where(near_TS, self.weight[distance_TS.clamp(0, self.reach - 1)], 0)


class SharedAttention(nn.Module):
    """One head's attention, of z [B, T, K], which queries and keys are made of, and values [B, T, F]. Abstract."""

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward(self, z_BTK: Tensor, v_BTF: Tensor, state: dict[str, Tensor] | None, at: Pass) -> Tensor:
        """A sequence: [B, T, F]. The state is brought up to date in place."""
        raise NotImplementedError

    def step(self, z_BTK: Tensor, v_BTF: Tensor, state: dict[str, Tensor], at: Pass) -> Tensor:
        """One token, [B, 1, F]. The state is brought up to date in place."""
        raise NotImplementedError


class GatedAttentionUnit(TokenMixer):
    """[B, T, D] -> [B, T, D]; with `updates`, an update gate stands for the residual connection; with `triple`, attention
    is to the gates too, and either's is a gate of the other.
    """

    def __init__(
        self,
        width: int,
        key_dim: int,
        inner: int,
        updates: bool,
        triple: bool,
        feed: TokenMixer | None,
        attention: SharedAttention,
    ) -> None:
        super().__init__()
        self.triple = triple
        self.feed = feed
        self.value = Dense(width, inner)
        self.sizes = [key_dim, inner, *([width, width] if updates else [])]
        self.made = Dense(width, sum(self.sizes))
        self.attention = attention
        self.out = Dense(inner, width)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        state = self.attention.initial_state(batch, capacity, device, dtype)
        return state if self.feed is None else state | self.feed.initial_state(batch, capacity, device, dtype)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        fed_BTD = x_BTD
        if self.feed is not None:
            fed_BTD, after = self.feed(x_BTD, state, at)
            state = None if state is None else state | after
        z_BTK, g_BTF, *update = self.made(fed_BTD).split(self.sizes, -1)
        v_BTF, g_BTF = F.silu(self.value(x_BTD)), F.silu(g_BTF)
        read_BTF = torch.cat([v_BTF, g_BTF], -1) if self.triple else v_BTF
        o_BTF = self.attention(F.silu(z_BTK), read_BTF, state, at)
        return self.finish(x_BTD, o_BTF, v_BTF, g_BTF, update), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        fed_BD = x_BD
        if self.feed is not None:
            fed_BD, _ = self.feed.step(x_BD, state, at)
        z_BK, g_BF, *update = self.made(fed_BD).split(self.sizes, -1)
        v_BF, g_BF = F.silu(self.value(x_BD)), F.silu(g_BF)
        read_BF = torch.cat([v_BF, g_BF], -1) if self.triple else v_BF
        o_BTF = self.attention.step(F.silu(z_BK)[:, None], read_BF[:, None], state, at)
        return self.finish(x_BD, o_BTF[:, 0], v_BF, g_BF, update), state

    def finish(self, x: Tensor, o: Tensor, v: Tensor, g: Tensor, update: list[Tensor]) -> Tensor:
        """The gates of the unit, or those of the update, around what attention says."""
        if self.triple:
            o_v, o_g = o.chunk(2, -1)
            y: Tensor = self.out(o_g * v * torch.sigmoid(o_v * g))
            return y
        read: Tensor = self.out(g * o)
        if not update:
            return read
        share, own = update
        return torch.sigmoid(share) * (F.silu(own + read) - x)


class BlockAttention(SharedAttention):
    """Over the tokens of one's own block up to oneself, or over all; softmax, or what `weigh` makes of the scores, to
    which `bias` adds.

    The cache keeps those of the present block.
    """

    def __init__(
        self,
        key_dim: int,
        channels: int,
        block: int | None,
        turns: bool,
        bias: DistanceBias | None,
        weigh: Weigh | None,
        earlier: EarlierBlocks | None,
        operation: Callable[[Tensor, Tensor, Tensor, int], Tensor],
        masked: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor],
    ) -> None:
        super().__init__()
        self.key_dim = key_dim
        self.channels = channels
        self.block = block
        self.query = ScaleOffset(key_dim, turns)
        self.key = ScaleOffset(key_dim, turns)
        self.bias = bias
        self.weigh = weigh
        self.earlier = earlier
        self.operation = operation
        self.masked = masked

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        slots = capacity if self.block is None else min(self.block, capacity)
        sizes = {"key": self.key_dim, "value": self.channels}
        state = {
            name: torch.zeros(batch, slots, size, device=device, dtype=dtype) for name, size in sizes.items()
        }
        return state if self.earlier is None else state | self.earlier.initial_state(batch, device, dtype)

    def forward(self, z_BTK: Tensor, v_BTF: Tensor, state: dict[str, Tensor] | None, at: Pass) -> Tensor:
        q_BTK, k_BTK = self.query(z_BTK, at.positions_T), self.key(z_BTK, at.positions_T)
        if state is None:
            o_BTF = self.by_blocks(q_BTK, k_BTK, v_BTF, 0)
        else:
            lead = at.start if self.block is None else at.start % self.block
            k, v = (
                torch.cat([state[name][:, :lead], new], 1) for name, new in (("key", k_BTK), ("value", v_BTF))
            )
            o_BTF = self.by_blocks(q_BTK, k, v, lead)
            last = slice(None if self.block is None else -min(self.block, z_BTK.shape[1]), None)
            place_T = self.place(at.positions_T[last])
            state["key"].index_copy_(1, place_T, k_BTK[:, last])
            state["value"].index_copy_(1, place_T, v_BTF[:, last])
        return o_BTF if self.earlier is None else o_BTF + self.earlier(z_BTK, v_BTF, state, at)

    def step(self, z_BTK: Tensor, v_BTF: Tensor, state: dict[str, Tensor], at: Pass) -> Tensor:
        q_BTK = self.query(z_BTK, at.positions_T)
        place_T = self.place(at.positions_T)
        state["key"].index_copy_(1, place_T, self.key(z_BTK, at.positions_T))
        state["value"].index_copy_(1, place_T, v_BTF)
        distance_TS = place_T[:, None] - torch.arange(state["key"].shape[1], device=place_T.device)
        q, k, v = (x[:, None] for x in (q_BTK, state["key"], state["value"]))
        o_BTF = self.over(q, k, v, distance_TS, attend_given)[:, 0]
        return o_BTF if self.earlier is None else o_BTF + self.earlier.step(z_BTK, v_BTF, state, at)

    def place(self, positions_T: Tensor) -> Tensor:
        """Slots of the cache: a token's place in its block."""
        return positions_T if self.block is None else positions_T % self.block

    def by_blocks(self, q_BTK: Tensor, k_BSK: Tensor, v_BSF: Tensor, lead: int) -> Tensor:
        """Queries of the tokens from `lead` on, over keys of a sequence that begins with a block."""
        batch, length, _ = k_BSK.shape
        if self.block is None or length <= self.block:
            return self.in_one(q_BTK[:, None], k_BSK[:, None], v_BSF[:, None], lead)[:, 0]
        # Queries of the tokens before are of no meaning, and their outputs are left out.
        given = (F.pad(q_BTK, (0, 0, lead, 0)), k_BSK, v_BSF)
        q, k, v = (in_blocks(x, self.block).flatten(0, 1)[:, None] for x in given)
        o = self.in_one(q, k, v, 0)
        return torch.unflatten(o[:, 0], 0, (batch, -1)).flatten(1, 2)[:, lead:length]

    def in_one(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, lead: int) -> Tensor:
        """Queries of the tokens from `lead` on, over the keys of their block so far."""
        if self.weigh is None and self.bias is None:
            return self.operation(q_BHTK, k_BHSK, v_BHSV, lead)
        place = torch.arange(k_BHSK.shape[2], device=q_BHTK.device)
        return self.over(q_BHTK, k_BHSK, v_BHSV, place[lead:, None] - place, self.masked)

    def over(
        self,
        q_BHTK: Tensor,
        k_BHSK: Tensor,
        v_BHSV: Tensor,
        distance_TS: Tensor,
        operation: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor],
    ) -> Tensor:
        """Over keys at these distances, those below 0 not being seen; softmax by the operation."""
        seen_TS, scale = distance_TS >= 0, self.key_dim**-0.5
        bias_TS = None if self.bias is None else self.bias(distance_TS)
        if self.weigh is not None:
            return weighed(q_BHTK * scale, k_BHSK, v_BHSV, seen_TS, bias_TS, self.weigh)
        if bias_TS is None:
            return operation(q_BHTK, k_BHSK, v_BHSV, seen_TS, scale)
        mask_TS = bias_TS.to(q_BHTK.dtype).masked_fill(~seen_TS, -torch.inf)
        return operation(q_BHTK, k_BHSK, v_BHSV, mask_TS, scale)


def in_blocks(x_BTF: Tensor, size: int) -> Tensor:
    """[B, C, L, F], the last block filled up with zeros."""
    return torch.unflatten(F.pad(x_BTF, (0, 0, 0, -x_BTF.shape[1] % size)), 1, (-1, size))


def weighed(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, seen_TS: Tensor, bias_TS: Tensor | None, weigh: Weigh
) -> Tensor:
    """Values weighed by what is made of the scores q . k."""
    exact = torch.float64 if q_BHTK.dtype == torch.float64 else torch.float32
    z_BHTS = (q_BHTK @ k_BHSK.transpose(2, 3)).to(exact)
    if bias_TS is not None:
        z_BHTS = z_BHTS + bias_TS
    o_BHTV: Tensor = weigh(z_BHTS, seen_TS).to(v_BHSV.dtype) @ v_BHSV
    return o_BHTV


class EarlierBlocks(nn.Module):
    """q_t . (sum over the tokens of earlier blocks of k_s v_s) / L, with queries and keys of its own.

    The state has the sum over the blocks before the present one, and that over its tokens so far.
    """

    def __init__(self, key_dim: int, channels: int, block: int, turns: bool) -> None:
        super().__init__()
        self.block = block
        self.shape = (key_dim, channels)
        self.query = ScaleOffset(key_dim, turns)
        self.key = ScaleOffset(key_dim, turns)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        held = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            name: torch.zeros(batch, *self.shape, device=device, dtype=held) for name in ("before", "present")
        }

    def forward(self, z_BTK: Tensor, v_BTF: Tensor, state: dict[str, Tensor] | None, at: Pass) -> Tensor:
        exact = torch.float64 if v_BTF.dtype == torch.float64 else torch.float32
        q_BTK = self.query(z_BTK, at.positions_T).to(exact)
        k_BTK = self.key(z_BTK, at.positions_T).to(exact)
        lead = 0 if state is None else at.start % self.block
        size = min(self.block, lead + z_BTK.shape[1])
        q, k, v = (in_blocks(F.pad(x, (0, 0, lead, 0)), size) for x in (q_BTK, k_BTK, v_BTF.to(exact)))
        each_BCKF = k.transpose(2, 3) @ v / self.block
        if state is not None:
            self.turn_over(state, at.positions_T[:1])
            each_BCKF = torch.cat([state["before"][:, None], each_BCKF], 1)
            each_BCKF[:, 1] += state["present"]
        else:
            each_BCKF = F.pad(each_BCKF, (0, 0, 0, 0, 1, 0))
        before_BCKF = each_BCKF[:, :-1].cumsum(1)
        if state is not None:
            state["before"].copy_(before_BCKF[:, -1])
            state["present"].copy_(each_BCKF[:, -1])
        o_BTF = (q @ before_BCKF).flatten(1, 2)[:, lead : lead + z_BTK.shape[1]]
        return o_BTF.to(v_BTF.dtype)

    def step(self, z_BTK: Tensor, v_BTF: Tensor, state: dict[str, Tensor], at: Pass) -> Tensor:
        self.turn_over(state, at.positions_T)
        exact = state["before"].dtype
        q_BTK, k_BTK = (made(z_BTK, at.positions_T).to(exact) for made in (self.query, self.key))
        state["present"].add_(k_BTK.transpose(1, 2) * v_BTF.to(exact) / self.block)
        o_BTF: Tensor = q_BTK @ state["before"]
        return o_BTF.to(v_BTF.dtype)

    def turn_over(self, state: dict[str, Tensor], position: Tensor) -> None:
        """A block is one of those before when the next one begins."""
        begins = position % self.block == 0
        state["before"].add_(torch.where(begins, state["present"], 0))
        state["present"].masked_fill_(begins, 0)
