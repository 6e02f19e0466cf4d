"""Feed-forward layer, a channel mixer: y = W_out act(W_in x).

Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 2, without its biases unless bias=all; `act=gelu` as in GPT-2,
`act=relu2` as in So et al. 2021 (arXiv 2109.08668). The hidden width is 4 times the model's unless `expand`
says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

from torch import Tensor, nn

from mixforge.search_space.expansion import NARROWEST, WIDEST, hidden_width, shortest_expand
from mixforge.search_space.genes import Choice, Real, replace
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.activation import gelu, relu, relu2, silu
from mixforge.search_space.parts.dense import Dense


@dataclass(frozen=True, slots=True)
class Mlp(Mixer):
    """Plain feed-forward layer. Genes: the activation, the hidden width over the model's width, and biases."""

    kind: ClassVar[Literal["token", "channel"]] = "channel"

    act: Annotated[str, Choice("gelu", "relu", "relu2", "silu")] = "gelu"
    expand: Annotated[int | float, Real(NARROWEST, WIDEST)] = 4
    bias: Annotated[str, Choice("none", "all")] = "none"

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
            raise ValueError(f"a share of {share} does not divide mlp's hidden width {self.hidden(width)}")
        return replace(self, expand=int(hidden) / width).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        matrices = 2 * width * self.hidden(width)
        params = matrices + (self.hidden(width) + width if self.bias == "all" else 0)
        return Cost(params=params, flops=2 * length * matrices, state_bytes=0, decode_bytes=params * itemsize)

    def build(self, width: int, backend: Backend) -> Part:
        return Part(
            FeedForward,
            width=width,
            hidden=self.hidden(width),
            activation=_ACTIVATIONS[self.act],
            bias=self.bias == "all",
        )


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "relu": relu,
    "relu2": relu2,
    "silu": silu,
}


class FeedForward(nn.Module):
    """[..., D] -> [..., D]."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = Dense(width, hidden, bias=bias)
        self.out = Dense(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.activation(self.up(x)))
        return y
