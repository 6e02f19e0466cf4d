"""Gated associative memory: a short convolution and a bank of learned slots, side by side under gates.

    local  = conv(x) + b
    global = softmax(x M^T) M,  M of `slots` rows
    y = sigmoid(W_l x + b_l) * local + sigmoid(W_g x + b_g) * global

The bank is a weight and not a state: only the convolution mixes tokens.

Source: Acharya 2025 (arXiv 2509.00605), section 3 and its public code. No departures in the layer; the model around it
has learned absolute positions there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from mixforge.kernels import short_conv
from mixforge.search_space.genes import Whole
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.short_convolution import ShortConvolution


@dataclass(frozen=True, slots=True)
class Gam(Mixer):
    """Gated associative memory. Genes: slots of the bank, and the tokens that the convolution sees."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    slots: Annotated[int, Whole(1, 65536)] = 512
    conv: Annotated[int, Whole(2, 8)] = 3

    def why_illegal(self, width: int) -> str | None:
        return None

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        bank = self.slots * width
        products = 2 * width * width + self.conv * width
        params = products + bank + 3 * width
        state = width * (self.conv - 1) * itemsize
        return Cost(
            params=params,
            flops=2 * length * (products + 2 * bank),
            state_bytes=state,
            decode_bytes=params * itemsize + 2 * state,
        )

    def build(self, width: int, backend: Backend) -> Part:
        conv = Part(
            ShortConvolution,
            channels=width,
            size=self.conv,
            activation="none",
            operation=short_conv.form(backend),
            one_step=short_conv.step_form(backend),
        )
        return Part(AssociativeMemory, width=width, slots=self.slots, conv=conv)


class AssociativeMemory(TokenMixer):
    """[B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, slots: int, conv: ShortConvolution) -> None:
        super().__init__()
        self.conv = conv
        self.shift = nn.Parameter(torch.zeros(width))
        self.bank = nn.Parameter(nn.init.xavier_uniform_(torch.empty(slots, width)))
        self.gates = Dense(width, 2 * width)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"conv": self.conv.initial_state(batch, device, dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        local_BTD, after_BDW = self.conv(x_BTD, None if state is None else state["conv"])
        return self._fused(x_BTD, local_BTD), None if state is None else {"conv": after_BDW}

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        return self._fused(x_BD, self.conv.step(x_BD, state["conv"])), state

    def _fused(self, x: Tensor, local: Tensor) -> Tensor:
        recalled = torch.softmax(x @ self.bank.T, -1) @ self.bank
        local_gate, recalled_gate = torch.sigmoid(self.gates(x)).chunk(2, -1)
        y: Tensor = local_gate * (local + self.shift) + recalled_gate * recalled
        return y
