"""Circular-convolutional attention: one vector of softmax weights, which each token applies shifted by its place.

    y_t = W_o sum_{s <= t} p_t(s) v_{t-s},  p_t(s) = exp(z_s) / sum_{r <= t} exp(z_r)

    score=token      z_s = w . x_s for each head
    score=averaged   z_s = q_s . k / sqrt(K), k the mean of the keys of the tokens up to s

So the weight of a lag s is that of token s. A sequence takes O(T log^2 T) work: of a block of 2m tokens the first m see
the first m weights alone; the others read those by one convolution of their softmax, by the fast Fourier transform,
and the last m weights as a block of m tokens would, each at its share of the sum. Blocks of 32 tokens are
multiplied out. No exponential is larger than 1.

Source: Yamada 2025 (CAT, arXiv 2504.06704): softmax(z) as a circulant matrix times the values by the Fourier transform,
z = x W_A or the averaged key.

Departures: the paper's circulant sees the whole sequence, and its causal form takes all pairs; here a token has the part
of it that came before, with a softmax over what it sees. The averaged key is the mean of the keys so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.genes import Choice, Whole
from mixforge.search_space.headed import HeadedMixer
from mixforge.search_space.mixer import Backend, Cost
from mixforge.search_space.part import Part
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads
from mixforge.search_space.parts.long_convolution import long_convolve

# Tokens whose weights are multiplied out.
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Cat(HeadedMixer):
    """Circular-convolutional attention. Genes: heads, channels of a head, and what the weights are made of."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    heads: Annotated[int | None, Whole(1, 256)] = None
    head_dim: Annotated[int | None, Whole(1, 1024)] = None
    score: Annotated[str, Choice("token", "averaged")] = "token"

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        inner = heads * head_dim
        params = width * (2 * inner + (heads if self.score == "token" else 2 * inner))
        block, blocks = blocks_of(length)
        slot = (inner + heads) * itemsize
        # The sum of the keys stays in float32.
        carried = 0 if self.score == "token" else inner * 4
        state_bytes = length * slot + carried
        return Cost(
            params=params,
            flops=2 * length * params + 2 * blocks * block * block * inner,
            state_bytes=state_bytes,
            decode_bytes=params * itemsize + state_bytes + slot + carried,
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        sizes = {"width": width, "heads": heads}
        score = Part(TokenScore, **sizes)
        if self.score == "averaged":
            score = Part(AveragedKey, **sizes, head_dim=head_dim)
        return Part(CircularAttention, **sizes, head_dim=head_dim, score=score)


class TokenScore(nn.Module):
    """w . x for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.weigh = Dense(width, heads, bias=False)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def forward(self, x_BTD: Tensor, state: dict[str, Tensor] | None, positions_T: Tensor) -> Tensor:
        """[B, H, T]."""
        z_BTH: Tensor = self.weigh(x_BTD)
        return z_BTH.transpose(1, 2)


class AveragedKey(nn.Module):
    """q . mean of the keys so far. The state is their sum, in float32 or better."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.mixed = Dense(width, 2 * heads * head_dim, bias=False)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {"sum": torch.zeros(batch, self.heads, self.head_dim, device=device, dtype=wide)}

    def forward(self, x_BTD: Tensor, state: dict[str, Tensor] | None, positions_T: Tensor) -> Tensor:
        """[B, H, T]. The state is brought up to date in place."""
        q, k = (split_heads(part, self.heads) for part in self.mixed(x_BTD).chunk(2, -1))
        sum_BTHK = exact(k).cumsum(1)
        if state is not None:
            sum_BTHK = sum_BTHK + state["sum"][:, None]
            state["sum"].copy_(sum_BTHK[:, -1])
        mean_BTHK = sum_BTHK / (positions_T + 1)[:, None, None]
        z_BTH: Tensor = (exact(q) * mean_BTHK).sum(-1) * self.head_dim**-0.5
        return z_BTH.to(x_BTD.dtype).transpose(1, 2)


class CircularAttention(TokenMixer):
    """[B, T, D] -> [B, T, D]. The state has the score and the value of every token."""

    def __init__(self, width: int, heads: int, head_dim: int, score: TokenScore | AveragedKey) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.score = score
        self.value = Dense(width, heads * head_dim, bias=False)
        self.out = Dense(heads * head_dim, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        shape = (batch, self.heads, capacity)
        state = {"score": torch.zeros(shape, device=device, dtype=dtype)}
        state["value"] = torch.zeros(*shape, self.head_dim, device=device, dtype=dtype)
        return {**state, **self.score.initial_state(batch, device, dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        z_BHT, v_BHTV = self.ask(x_BTD, state, at)
        if state is None:
            return self.answer(shifted_softmax(z_BHT, v_BHTV), x_BTD), None
        for name, new in (("score", z_BHT), ("value", v_BHTV)):
            state[name].index_copy_(2, at.positions_T, new)
        end = at.start + x_BTD.shape[1]
        y_BHTV = shifted_softmax(state["score"][:, :, :end], state["value"][:, :, :end])
        return self.answer(y_BHTV[:, :, at.start :], x_BTD), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        z_BHT, v_BHTV = self.ask(x_BD[:, None], state, at)
        for name, new in (("score", z_BHT), ("value", v_BHTV)):
            state[name].index_copy_(2, at.positions_T, new)
        slot_S = torch.arange(state["score"].shape[2], device=x_BD.device)
        seen_S = slot_S <= at.positions_T
        p_BHS = exact(state["score"]).masked_fill(~seen_S, -torch.inf).softmax(-1)
        # The lag of a slot's token; slots that are not written yet hold zeros.
        lag_S = (at.positions_T - slot_S).clamp(min=0)
        y_BHV = (p_BHS[..., lag_S, None] * state["value"]).sum(2)
        return self.answer(y_BHV[:, :, None], x_BD)[:, 0], state

    def ask(self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass) -> tuple[Tensor, Tensor]:
        """Scores [B, H, T] and values [B, H, T, V]."""
        z_BHT: Tensor = self.score(x_BTD, state, at.positions_T)
        return z_BHT, split_heads(self.value(x_BTD), self.heads).transpose(1, 2)

    def answer(self, y_BHTV: Tensor, x: Tensor) -> Tensor:
        y_BTD: Tensor = self.out(y_BHTV.transpose(1, 2).flatten(2).to(x.dtype))
        return y_BTD


def blocks_of(length: int) -> tuple[int, int]:
    """Tokens of a block that is multiplied out, and how many blocks a sequence is filled up to."""
    if length <= BLOCK:
        return length, 1
    return BLOCK, 1 << (-(-length // BLOCK) - 1).bit_length()


def shifted_softmax(z_BHT: Tensor, v_BHTV: Tensor) -> Tensor:
    """sum_{s <= t} softmax_{s <= t}(z)_s v_{t-s}, in float32 or better: [B, H, T], [B, H, T, V] -> [B, H, T, V]."""
    length = z_BHT.shape[2]
    block, blocks = blocks_of(length)
    # What fills up has no weight, and no token reads its values. It is finite, as are the gradients then.
    z = F.pad(exact(z_BHT), (0, blocks * block - length), value=-1e30)
    z = torch.unflatten(z, 2, (blocks, block))
    v = F.pad(exact(v_BHTV), (0, 0, 0, blocks * block - length))
    place = torch.arange(block, device=z.device)
    lag = place[:, None] - place
    each = z[..., lag.clamp(min=0)].masked_fill(lag < 0, -torch.inf)
    # Of the weights of each block alone: the logarithm of their sum up to each place, and what that place reads.
    total = each.logsumexp(-1)
    read = (each - total[..., None]).exp().flatten(2, 3) @ v[:, :, :block]
    read = torch.unflatten(read, 2, (blocks, block))
    while read.shape[2] > 1:
        size = read.shape[3]
        pairs = torch.unflatten(z, 2, (-1, 2))
        early_total, late_total = torch.unflatten(total, 2, (-1, 2)).unbind(3)
        early_read, late_read = torch.unflatten(read, 2, (-1, 2)).unbind(3)
        whole = early_total[..., -1:]
        weights = (pairs[:, :, :, 0] - whole).exp()[..., None, :]
        before = long_convolve(weights, v[:, :, None, : 2 * size].transpose(3, 4), size).transpose(3, 4)
        late_share = torch.sigmoid(late_total - whole)[..., None]
        read = torch.cat([early_read, torch.lerp(before, late_read, late_share)], 3)
        total = torch.cat([early_total, torch.logaddexp(whole, late_total)], 3)
        z = pairs.flatten(3)
    y_BHTV: Tensor = read[:, :, 0, :length]
    return y_BHTV
