"""Static mixing: a fixed causal filter for each head, whatever the input: y_t = sum_{s < W} a_h[s] v_{t-s}.

A Toeplitz matrix over time in the place of the attention matrix. Sources: Tay et al. 2020 (arXiv 2005.00743),
the random Synthesizer, whose matrix does not depend on the input; Qin et al. 2023 (arXiv 2305.04749),
equation 5, for the Toeplitz form and heads of channels that share a filter.

Departures: the filter is cut at `window` tokens and learned entry by entry, without a network over relative
positions; there is no softmax and no gate. It starts as an exponential of its own length in each head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.genes import Whole
from mixforge.search_space.heads import default_heads, heads_that_divide, shared_heads
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads


@dataclass(frozen=True, slots=True)
class Static(Mixer):
    """Toeplitz mixing. Genes: the filter's tokens, heads (filters), and channels of a head."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    window: Annotated[int, Whole(2, 65536)] = 64
    heads: Annotated[int | None, Whole(1, 1024)] = None
    head_dim: Annotated[int | None, Whole(1, 1024)] = None

    def sizes(self, width: int) -> tuple[int, int]:
        """Heads and channels of a head."""
        heads = default_heads(width) if self.heads is None else self.heads
        return heads, max(1, width // heads) if self.head_dim is None else self.head_dim

    def why_illegal(self, width: int) -> str | None:
        heads, _ = self.sizes(width)
        if self.head_dim is None and width % heads != 0:
            return (
                f"heads {heads} does not divide width {width} (mixer static); "
                f"legal heads: {heads_that_divide(width)}, or say head_dim"
            )
        return None

    def canonical(self, width: int) -> Self:
        heads, head_dim = self.sizes(width)
        follows = width % heads == 0 and head_dim == width // heads
        return replace(
            self,
            heads=None if heads == default_heads(width) else heads,
            head_dim=None if follows else head_dim,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        heads, head_dim = self.sizes(width)
        return replace(self, heads=shared_heads("static", heads, share), head_dim=head_dim).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        inner = heads * head_dim
        params = 2 * width * inner + heads * self.window
        block = min(length, self.window)
        rows = -(-length // block) * block
        slot = inner * itemsize
        kept = min(length, self.window) * slot
        return Cost(
            params=params,
            flops=4 * length * width * inner + 2 * rows * (block + self.window - 1) * inner,
            state_bytes=kept,
            decode_bytes=params * itemsize + kept + slot,
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        return Part(StaticMixing, width=width, heads=heads, head_dim=head_dim, window=self.window)


class StaticMixing(TokenMixer):
    """[B, T, D] -> [B, T, D]. The state is a ring of the last `window` values: token t is in slot t mod W."""

    def __init__(self, width: int, heads: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.window = window
        self.value = nn.Linear(width, heads * head_dim, bias=False)
        # Lengths from 2 tokens to the window, in equal ratios.
        length = 2.0 * (window / 2) ** ((torch.arange(heads) + 0.5) / heads)
        past = torch.arange(window)
        self.filter = nn.Parameter(torch.exp(-past / length[:, None]) / length[:, None])
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        slots = min(self.window, capacity)
        return {"value": torch.zeros(batch, self.heads, slots, self.head_dim, device=device, dtype=dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        v_BHTV = split_heads(self.value(x_BTD), self.heads).transpose(1, 2)
        past_BHWV = v_BHTV.new_zeros(x_BTD.shape[0], self.heads, self.window - 1, self.head_dim)
        if state is not None and at.start > 0:
            kept = min(at.start, self.window - 1)
            ring = torch.arange(at.start - kept, at.start, device=x_BTD.device) % state["value"].shape[2]
            past_BHWV[:, :, self.window - 1 - kept :] = state["value"][:, :, ring]
        y_BHTV = toeplitz(self.filter, v_BHTV, past_BHWV)
        if state is not None:
            slots = state["value"].shape[2]
            kept = min(slots, x_BTD.shape[1])
            state["value"].index_copy_(2, at.positions_T[-kept:] % slots, v_BHTV[:, :, -kept:])
        return self.out(y_BHTV.transpose(1, 2).flatten(2)), state

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        slots = state["value"].shape[2]
        v_BHTV = split_heads(self.value(x_BD), self.heads)[:, :, None]
        state["value"].index_copy_(2, at.positions_T % slots, v_BHTV)
        # Slot w holds the token of (position - w) mod W tokens ago; slots not written yet hold zeros.
        age_W = (at.positions_T - torch.arange(slots, device=x_BD.device)) % slots
        y_BHV = (self.filter[:, age_W, None] * state["value"]).sum(2)
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
