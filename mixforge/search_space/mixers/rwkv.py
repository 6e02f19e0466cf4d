"""RWKV's channel mixing, a channel mixer that also sees the token before its own.

    x'_c = x_t + mu_c (x_{t-1} - x_t)    for c of k, r
    y_t = sigmoid(W_r x'_r) * (W_v max(W_k x'_k, 0)^2)

Source: Peng et al. 2023 (arXiv 2305.13048), equations 12 and 16 to 18, for RWKV-4; RWKV-5 and 6 have the same one
(Peng et al. 2024, arXiv 2404.05892). receptance=none leaves sigmoid(W_r x'_r) off, as RWKV-7 does (Peng et al. 2025,
arXiv 2503.14456, section 4). Departure: mu starts as it does in the first layer, in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from mixforge.search_space.expansion import NARROWEST, WIDEST, hidden_width, shortest_expand
from mixforge.search_space.genes import Choice, Real, replace
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.activation import relu2
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.token_shift import TokenShift


@dataclass(frozen=True, slots=True)
class Rwkv(Mixer):
    """RWKV's channel mixing. Genes: its gate, and the hidden width over the model's width."""

    kind: ClassVar[Literal["token", "channel"]] = "channel"

    receptance: Annotated[str, Choice("sigmoid", "none")] = "sigmoid"
    expand: Annotated[int | float, Real(NARROWEST, WIDEST)] = 4

    @property
    def is_pointwise(self) -> bool:
        return False

    def hidden(self, width: int) -> int:
        """Hidden width."""
        return hidden_width(self.expand, width)

    def why_illegal(self, width: int) -> str | None:
        return None

    def canonical(self, width: int) -> Self:
        short = shortest_expand(self.expand, width)
        return self if repr(short) == repr(self.expand) else replace(self, expand=short)

    def narrow(self, width: int, share: Fraction) -> Self:
        hidden = self.hidden(width) * share
        if hidden.denominator != 1:
            raise ValueError(f"a share of {share} does not divide rwkv's hidden width {self.hidden(width)}")
        return replace(self, expand=int(hidden) / width).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        products = 2 * width * self.hidden(width)
        vectors = width
        if self.receptance == "sigmoid":
            products += width * width
            vectors += width
        state = width * itemsize
        return Cost(
            params=products + vectors,
            flops=2 * length * products,
            state_bytes=state,
            decode_bytes=(products + vectors) * itemsize + 2 * state,
        )

    def build(self, width: int, backend: Backend) -> Part:
        return Part(
            ChannelMixing,
            width=width,
            hidden=self.hidden(width),
            has_receptance=self.receptance == "sigmoid",
        )


class ChannelMixing(TokenMixer):
    """[B, T, D] -> [B, T, D]; its state is the last token."""

    def __init__(self, width: int, hidden: int, has_receptance: bool) -> None:
        super().__init__()
        self.width = width
        # Of k, and of r where there is one.
        self.shift = TokenShift(width, count=2 if has_receptance else 1, lowrank=False)
        self.up = Dense(width, hidden, bias=False)
        self.receptance = Dense(width, width, bias=False) if has_receptance else None
        self.out = Dense(hidden, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"past": torch.zeros(batch, self.width, device=device, dtype=dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        y_BTD = self.mixed(x_BTD, None if state is None else state["past"])
        return y_BTD, None if state is None else {"past": x_BTD[:, -1].clone()}

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        y_BTD = self.mixed(x_BD[:, None], state["past"])
        state["past"].copy_(x_BD)
        return y_BTD[:, 0], state

    def mixed(self, x_BTD: Tensor, past_BD: Tensor | None) -> Tensor:
        """Each token with its predecessor, which is all that it sees."""
        seen, _ = self.shift(x_BTD, past_BD)
        y: Tensor = self.out(relu2(self.up(seen[0])))
        return y if self.receptance is None else torch.sigmoid(self.receptance(seen[1])) * y
