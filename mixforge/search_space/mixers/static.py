"""Static mixing: how tokens are mixed depends on where they stand, not on what they are.

    y_t = sum_{t-W < s <= t} a_h(t, s) v_s
    matrix=toeplitz   a(t, s) = f[t - s], a learned filter
    matrix=random     a(t, s) = softmax over the visible s of R[t mod W, s mod W], R drawn once and never trained
    matrix=learned    the same, R trained

In the first W tokens a(t, s) is any causal matrix, and after them it repeats itself every W tokens.

Sources: Tay et al. 2020 (arXiv 2005.00743), section 3.2, the random Synthesizer, fixed and trained: Y = softmax(R) G(X).
Xue et al. 2025 (arXiv 2510.11602), section 3.4, have such layers between layers of attention; their fixed scores are
those of random embeddings that passed the layers below, and here they are drawn for each layer by themselves. Qin et
al. 2023 (arXiv 2305.04749), equation 5, for the Toeplitz form and heads of channels that share a filter.

Departures: the Toeplitz filter is cut at `window` tokens and learned entry by entry, without a network over relative
positions; it starts as an exponential of its own length in each head, and has no softmax and no gate. The entries of
matrix=random are constants, which count as no weights.
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
from mixforge.search_space.parts.banded import banded_flops, mix_banded
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads

# The window of a matrix that is kept entry by entry; a filter's may be longer.
LARGEST_MATRIX = 4096


@dataclass(frozen=True, slots=True)
class Static(HeadedMixer):
    """Static mixing. Genes: the matrix, the tokens that it reaches, heads (matrices), and channels of a head."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    matrix: Annotated[str, Choice("toeplitz", "random", "learned")] = "toeplitz"
    window: Annotated[int, Whole(2, 65536)] = 64
    heads: Annotated[int | None, Whole(1, 1024)] = None
    head_dim: Annotated[int | None, Whole(1, 1024)] = None

    def why_illegal(self, width: int) -> str | None:
        if self.matrix != "toeplitz" and self.window > LARGEST_MATRIX:
            return (
                f"matrix={self.matrix} has {self.window} x {self.window} entries for each head (mixer static); "
                f"say a window of at most {LARGEST_MATRIX}, or matrix=toeplitz"
            )
        return HeadedMixer.why_illegal(self, width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        inner = heads * head_dim
        # One row of a learned matrix says how a token mixes, and the whole of a filter.
        entries = heads * self.window * {"toeplitz": 1, "random": 0, "learned": self.window}[self.matrix]
        row = 0 if self.matrix == "random" else heads * self.window
        params = 2 * width * inner + entries
        block = min(length, self.window)
        if self.matrix == "toeplitz":
            mixed = 2 * -(-length // block) * block * (block + self.window - 1) * inner
        else:
            mixed = banded_flops(length, self.window) * inner
        slot = inner * itemsize
        kept = min(length, self.window) * slot
        return Cost(
            params=params,
            flops=4 * length * width * inner + mixed,
            state_bytes=kept,
            decode_bytes=(2 * width * inner + row) * itemsize + kept + slot,
            idle_params=entries - row,
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        if self.matrix == "toeplitz":
            mixing = Part(Filter, heads=heads, window=self.window)
        else:
            mixing = Part(SoftmaxMatrix, heads=heads, window=self.window, trained=self.matrix == "learned")
        return Part(
            StaticMixing, width=width, heads=heads, head_dim=head_dim, window=self.window, mixing=mixing
        )


class Filter(nn.Module):
    """A filter for each head: y_t = sum_s filter[s] v_{t-s}."""

    def __init__(self, heads: int, window: int) -> None:
        super().__init__()
        # Lengths from 2 tokens to the window, in equal ratios.
        length = 2.0 * (window / 2) ** ((torch.arange(heads) + 0.5) / heads)
        past = torch.arange(window)
        self.filter = nn.Parameter(torch.exp(-past / length[:, None]) / length[:, None])

    def forward(self, v_BHTV: Tensor, ring_BHWV: Tensor | None, start: int) -> Tensor:
        batch, heads, _, head_dim = v_BHTV.shape
        past = self.filter.shape[1] - 1
        past_BHWV = v_BHTV.new_zeros(batch, heads, past, head_dim)
        if ring_BHWV is not None and start > 0:
            kept = min(start, past)
            slots = torch.arange(start - kept, start, device=v_BHTV.device) % ring_BHWV.shape[2]
            past_BHWV[:, :, past - kept :] = ring_BHWV[:, :, slots]
        return toeplitz(self.filter, v_BHTV, past_BHWV)

    def step(self, ring_BHWV: Tensor, position: Tensor) -> Tensor:
        # Slot w holds the token of (position - w) mod W tokens ago; slots not written yet hold zeros.
        slots = ring_BHWV.shape[2]
        age_W = (position - torch.arange(slots, device=ring_BHWV.device)) % slots
        return (self.filter[:, age_W, None] * ring_BHWV).sum(2)


class SoftmaxMatrix(nn.Module):
    """A matrix of scores for each head, fixed or trained, with a softmax over what a token sees."""

    def __init__(self, heads: int, window: int, trained: bool) -> None:
        super().__init__()
        score_HWW = torch.randn(heads, window, window)
        self.score = nn.Parameter(score_HWW) if trained else nn.Buffer(score_HWW)

    def forward(self, v_BHTV: Tensor, ring_BHWV: Tensor | None, start: int) -> Tensor:
        seen = torch.ones(self.score.shape[1:], dtype=torch.bool, device=v_BHTV.device).tril()
        first_HWW = self.score.masked_fill(~seen, -torch.inf).softmax(-1)
        return mix_banded(first_HWW, self.score.softmax(-1), v_BHTV, ring_BHWV, start)

    def step(self, ring_BHWV: Tensor, position: Tensor) -> Tensor:
        slots = ring_BHWV.shape[2]
        row_HW = self.score[:, position % self.score.shape[1], :slots][:, 0]
        seen_W = torch.arange(slots, device=ring_BHWV.device) <= position
        return (row_HW.masked_fill(~seen_W, -torch.inf).softmax(-1)[..., None] * ring_BHWV).sum(2)


class StaticMixing(TokenMixer):
    """[B, T, D] -> [B, T, D]. The state is a ring of the last `window` values: token t is in slot t mod W."""

    def __init__(
        self, width: int, heads: int, head_dim: int, window: int, mixing: Filter | SoftmaxMatrix
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.window = window
        self.value = Dense(width, heads * head_dim, bias=False)
        self.mixing = mixing
        self.out = Dense(heads * head_dim, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        slots = min(self.window, capacity)
        return {"value": torch.zeros(batch, self.heads, slots, self.head_dim, device=device, dtype=dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        v_BHTV = split_heads(self.value(x_BTD), self.heads).transpose(1, 2)
        y_BHTV = self.mixing(v_BHTV, None if state is None else state["value"], at.start)
        if state is not None:
            slots = state["value"].shape[2]
            kept = min(slots, x_BTD.shape[1])
            state["value"].index_copy_(2, at.positions_T[-kept:] % slots, v_BHTV[:, :, -kept:])
        return self.out(y_BHTV.transpose(1, 2).flatten(2)), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        slots = state["value"].shape[2]
        v_BHTV = split_heads(self.value(x_BD), self.heads)[:, :, None]
        state["value"].index_copy_(2, at.positions_T % slots, v_BHTV)
        y_BHV = self.mixing.step(state["value"], at.positions_T)
        return self.out(y_BHV.flatten(1)), state


def toeplitz(filter_HW: Tensor, v_BHTV: Tensor, past_BHWV: Tensor) -> Tensor:
    """y_t = sum_s filter[s] v_{t-s}, in blocks of up to W; `past` is the W - 1 values before the first."""
    length, window = v_BHTV.shape[2], filter_HW.shape[1]
    block = min(length, window)
    blocks = -(-length // block)
    padded = torch.cat([past_BHWV, F.pad(v_BHTV, (0, 0, 0, blocks * block - length))], 2)
    # Each block with its own tokens and the W - 1 before them: [B, H, C, V, block + W - 1].
    seen = padded.unfold(2, block + window - 1, block)
    query = torch.arange(block, device=v_BHTV.device)[:, None]
    key = torch.arange(block + window - 1, device=v_BHTV.device)
    lag = query + window - 1 - key
    inside = (lag >= 0) & (lag < window)
    matrix = torch.where(inside, filter_HW[:, lag.clamp(0, window - 1)], 0)
    y = torch.einsum("hqk,bhcvk->bhcqv", matrix, seen)
    return y.flatten(2, 3)[:, :, :length]
