"""Causal convolutions over a few tokens, with the products that let them depend on their input.

    gate=both   y = W_out (c * conv(b * v))        b, c and v projections of x
    gate=base   y = (W x + a) * (conv(x) + d)      BaseConv, which has no output projection
    gate=none   y = W_out act(conv(x))

    conv(x)_t = sum_{j < size} w_j x_{t - j dilation}       w_j a number for each channel, or a matrix: kernel=dense

Sources: gate=both: Fu et al. 2022 (arXiv 2212.14052), figure 1 (the shift and the multiplicative gates of H3); in this
form the short-range layer of LFM2 (Liquid AI 2025, arXiv 2511.23404). gate=base: Arora et al. 2023 (arXiv 2312.04927),
equation 2, with a short filter. gate=none: Bai et al. 2018 (TCN, arXiv 1803.01271), section 3, with kernel=dense and
dilations that double from layer to layer.

Departures: gate=both and gate=none have no biases; a TCN's block is two dilated convolutions with weight norm and
dropout, of which the second is here a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mixforge.kernels import short_conv
from mixforge.search_space.genes import Choice, GeneValue, Whole, replace
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.activation import gelu, identity, relu, silu
from mixforge.search_space.parts.causal_convolution import (
    CausalConvolution,
    Convolution,
    convolve,
    convolve_one,
)
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.short_convolution import ShortConvolution

# The longest filter of the fused operation.
LONGEST_FUSED = 8


@dataclass(frozen=True, slots=True)
class Conv(Mixer):
    """Causal convolution. Genes: the tokens that it sees, how far apart they are, whether a tap is a number or a matrix
    for each channel, the products around it, and the activation of one without products.
    """

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "baseconv": {"gate": "base"},
        "tcn": {"gate": "none", "act": "relu", "kernel": "dense"},
    }

    size: Annotated[int, Whole(2, 256)] = 3
    dilation: Annotated[int, Whole(1, 4096)] = 1
    kernel: Annotated[str, Choice("channel", "dense")] = "channel"
    gate: Annotated[str, Choice("both", "base", "none")] = "both"
    act: Annotated[str, Choice("none", "relu", "gelu", "silu")] = "none"

    @property
    def is_fused(self) -> bool:
        """Whether it is the fused operation's convolution."""
        return self.size <= LONGEST_FUSED and self.dilation == 1 and self.kernel == "channel"

    def why_illegal(self, width: int) -> str | None:
        return None

    def canonical(self, width: int) -> Self:
        return self if self.gate == "none" else replace(self, act="none")

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        taps = width * self.size * (width if self.kernel == "dense" else 1)
        products = {"both": 4, "base": 1, "none": 1}[self.gate] * width * width + taps
        params = products + (2 * width if self.gate == "base" else 0)
        state = width * (self.size - 1) * self.dilation * itemsize
        return Cost(
            params=params,
            flops=2 * length * products,
            state_bytes=state,
            # The fused operation's state moves on by one token; a ring takes the token in its place.
            decode_bytes=params * itemsize + state + (state if self.is_fused else width * itemsize),
        )

    def build(self, width: int, backend: Backend) -> Part:
        if self.is_fused:
            conv = Part(
                ShortConvolution,
                channels=width,
                size=self.size,
                activation="none",
                operation=short_conv.form(backend),
                one_step=short_conv.step_form(backend),
            )
        else:
            conv = Part(
                CausalConvolution,
                channels=width,
                size=self.size,
                dilation=self.dilation,
                dense=self.kernel == "dense",
            )
        if self.gate == "none":
            return Part(PlainConvolution, width=width, conv=conv, act=_ACTIVATIONS[self.act])
        return Part({"both": GatedConvolution, "base": BaseConvolution}[self.gate], width=width, conv=conv)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": identity,
    "relu": relu,
    "gelu": gelu,
    "silu": silu,
}


class GatedConvolution(TokenMixer):
    """[B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, conv: Convolution) -> None:
        super().__init__()
        self.mixed = Dense(width, 3 * width, bias=False)
        self.conv = conv
        self.out = Dense(width, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"conv": self.conv.initial_state(batch, device, dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        into_BTD, out_of_BTD, v_BTD = self.mixed(x_BTD).chunk(3, -1)
        y_BTD, after = convolve(self.conv, into_BTD * v_BTD, state, at)
        return self.out(out_of_BTD * y_BTD), after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        into_BD, out_of_BD, v_BD = self.mixed(x_BD).chunk(3, -1)
        return self.out(out_of_BD * convolve_one(self.conv, into_BD * v_BD, state, at)), state


class BaseConvolution(TokenMixer):
    """[B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, conv: Convolution) -> None:
        super().__init__()
        self.gate = Dense(width, width)
        self.conv = conv
        self.shift = nn.Parameter(torch.zeros(width))

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"conv": self.conv.initial_state(batch, device, dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        y_BTD, after = convolve(self.conv, x_BTD, state, at)
        return self.gate(x_BTD) * (y_BTD + self.shift), after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        return self.gate(x_BD) * (convolve_one(self.conv, x_BD, state, at) + self.shift), state


class PlainConvolution(TokenMixer):
    """[B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, conv: Convolution, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = conv
        self.act = act
        self.out = Dense(width, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"conv": self.conv.initial_state(batch, device, dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        y_BTD, after = convolve(self.conv, x_BTD, state, at)
        return self.out(self.act(y_BTD)), after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        return self.out(self.act(convolve_one(self.conv, x_BD, state, at))), state
