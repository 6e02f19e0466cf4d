"""Gated linear unit, a channel mixer: y = W_out (act(W_gate x) * W_in x).

Source: Shazeer 2020 (arXiv 2002.05202), equation 6 (`act=silu` is SwiGLU there, `act=gelu` GEGLU, `act=sigmoid` GLU and
`act=none` Bilinear). There are no biases, as there, unless bias=all; act=clamped(limit) is GPT-OSS's SwiGLU and
act=gelu_tanh Gemma's GEGLU (see `parts.activation`). The hidden width is 8/3 of the model's unless `expand` says
otherwise, rounded up to a multiple of 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

from torch import Tensor, nn

from mixforge.search_space.expansion import NARROWEST, WIDEST, hidden_width, shortest_expand
from mixforge.search_space.genes import Call, Choice, Form, GeneValue, Real, replace
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.activation import (
    ClampedSwiglu,
    bilinear,
    geglu,
    geglu_tanh,
    sigmoid_glu,
    swiglu,
)
from mixforge.search_space.parts.dense import Dense


def usual_hidden(width: int) -> int:
    """Hidden width where `expand` says nothing."""
    return 8 * math.ceil(width / 3)


@dataclass(frozen=True, slots=True)
class Glu(Mixer):
    """Gated feed-forward layer. Genes: the gate's activation, the hidden width over the model's, and biases."""

    kind: ClassVar[Literal["token", "channel"]] = "channel"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "geglu": {"act": "gelu"},
        "swiglu": {"act": "silu"},
    }

    act: Annotated[
        str | Form, Choice("silu", "gelu", "sigmoid", "none", "gelu_tanh"), Call("clamped", Real(0.125, 1024))
    ] = "silu"
    expand: Annotated[int | float | None, Real(NARROWEST, WIDEST)] = None
    bias: Annotated[str, Choice("none", "all")] = "none"

    def hidden(self, width: int) -> int:
        """Hidden width."""
        if self.expand is None:
            return usual_hidden(width)
        return hidden_width(self.expand, width)

    def why_illegal(self, width: int) -> str | None:
        return None

    def canonical(self, width: int) -> Self:
        if self.expand is None:
            return self
        usual = self.hidden(width) == usual_hidden(width)
        return replace(self, expand=None if usual else shortest_expand(self.expand, width))

    def narrow(self, width: int, share: Fraction) -> Self:
        hidden = self.hidden(width) * share
        if hidden.denominator != 1:
            raise ValueError(f"a share of {share} does not divide glu's hidden width {self.hidden(width)}")
        return replace(self, expand=int(hidden) / width).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        matrices = 3 * width * self.hidden(width)
        params = matrices + (2 * self.hidden(width) + width if self.bias == "all" else 0)
        return Cost(params=params, flops=2 * length * matrices, state_bytes=0, decode_bytes=params * itemsize)

    def build(self, width: int, backend: Backend) -> Part:
        act = self.act
        product = _PRODUCTS[act] if isinstance(act, str) else Part(ClampedSwiglu, limit=act.arguments[0])
        return Part(
            GatedUnit, width=width, hidden=self.hidden(width), product=product, bias=self.bias == "all"
        )


_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": swiglu,
    "gelu": geglu,
    "gelu_tanh": geglu_tanh,
    "sigmoid": sigmoid_glu,
    "none": bilinear,
}


class GatedUnit(nn.Module):
    """[..., D] -> [..., D]."""

    def __init__(
        self, width: int, hidden: int, product: Callable[[Tensor, Tensor], Tensor], bias: bool
    ) -> None:
        super().__init__()
        self.product = product
        self.gate = Dense(width, hidden, bias=bias)
        self.up = Dense(width, hidden, bias=bias)
        self.out = Dense(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.product(self.gate(x), self.up(x)))
        return y
