"""Real-gated linear recurrent unit: an elementwise recurrence with gates, in its two-branch block.

    r_t = sigmoid(W_r x_t + b_r)          recurrence gate
    i_t = sigmoid(W_i x_t + b_i)          input gate
    log a_t = -8 softplus(lambda) r_t
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)
    block: W_out (gelu(W_gate u) * h), with x = conv(W_in u)

Source: De et al. 2024 (arXiv 2402.19427), equations 1 to 4 and figure 2. W_r and W_i are block diagonal, one
block for each head, as in its authors' code (RecurrentGemma, arXiv 2404.07839). lambda starts with a
between 0.9 and 0.999 at r = 1.

Departures: the recurrence is as wide as the model, not 4/3 as wide, unless head_dim says so; projections and
convolution have no biases; the first token's input is scaled like every other's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels import gated_scan, short_conv
from mixforge.search_space.genes import Choice, Whole
from mixforge.search_space.heads import default_heads, heads_that_divide, shared_heads
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.short_convolution import ShortConvolution


@dataclass(frozen=True, slots=True)
class Rglru(Mixer):
    """Griffin's recurrent block. Genes: blocks of the gates, their width, and the convolution's tokens."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    heads: Annotated[int | None, Whole(1, 256)] = None
    head_dim: Annotated[int | None, Whole(1, 4096)] = None
    conv: Annotated[str | int, Choice("none"), Whole(2, 8)] = 4

    def sizes(self, width: int) -> tuple[int, int]:
        """Heads and channels of a head."""
        heads = default_heads(width) if self.heads is None else self.heads
        return heads, max(1, width // heads) if self.head_dim is None else self.head_dim

    def why_illegal(self, width: int) -> str | None:
        heads, _ = self.sizes(width)
        if self.head_dim is None and width % heads != 0:
            return (
                f"heads {heads} does not divide width {width} (mixer rglru); "
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
        return replace(self, heads=shared_heads("rglru", heads, share), head_dim=head_dim).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        inner = heads * head_dim
        taps = 0 if isinstance(self.conv, str) else self.conv
        products = 3 * width * inner + 2 * inner * head_dim + inner * taps
        params = products + 3 * inner
        state = 4 * inner + inner * max(0, taps - 1) * itemsize
        return Cost(
            params=params,
            flops=2 * length * products,
            state_bytes=state,
            decode_bytes=params * itemsize + 2 * state,
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        conv = None
        if isinstance(self.conv, int):
            conv = Part(
                ShortConvolution,
                channels=heads * head_dim,
                size=self.conv,
                activation="none",
                operation=short_conv.form(backend),
                one_step=short_conv.step_form(backend),
            )
        return Part(
            RecurrentBlock,
            width=width,
            heads=heads,
            head_dim=head_dim,
            conv=conv,
            operation=gated_scan.form(backend),
            one_step=gated_scan.step_form(backend),
        )


class BlockGate(nn.Module):
    """sigmoid(W x + b), W block diagonal: [B, T, H*K] -> [B, T, H*K], in float32 or better."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(heads, head_dim, head_dim).uniform_(-1, 1) / math.sqrt(head_dim)
        )
        self.bias = nn.Parameter(torch.zeros(heads * head_dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, length, _ = x_BTD.shape
        heads, head_dim, _ = self.weight.shape
        x_HMK = x_BTD.reshape(batch * length, heads, head_dim).transpose(0, 1)
        gate_BTD = torch.bmm(x_HMK, self.weight).transpose(0, 1).reshape(x_BTD.shape) + self.bias
        return torch.sigmoid(gate_BTD if gate_BTD.dtype == torch.float64 else gate_BTD.float())


class RecurrentBlock(TokenMixer):
    """[B, T, D] -> [B, T, D]."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        conv: ShortConvolution | None,
        operation: Callable[..., tuple[Tensor, Tensor]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.operation = operation
        self.one_step = one_step
        self.gate = nn.Linear(width, inner, bias=False)
        self.into = nn.Linear(width, inner, bias=False)
        self.conv = conv
        self.recurrence_gate = BlockGate(heads, head_dim)
        self.input_gate = BlockGate(heads, head_dim)
        # softplus(rate) = -log(a) / 8, with a between 0.9 and 0.999 where the recurrence gate is 1.
        decay = torch.empty(inner).uniform_(0.9, 0.999)
        self.rate = nn.Parameter(torch.log(torch.expm1(-torch.log(decay) / 8)))
        self.out = nn.Linear(inner, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        state = {"hidden": torch.zeros(batch, self.rate.shape[0], device=device, dtype=exact)}
        if self.conv is not None:
            state["conv"] = self.conv.initial_state(batch, device, dtype)
        return state

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        after: dict[str, Tensor] = {}
        into_BTD = self.into(x_BTD)
        if self.conv is not None:
            into_BTD, after["conv"] = self.conv(into_BTD, None if state is None else state["conv"])
        log_a_BTD, b_BTD = self.gates_of(into_BTD)
        h_BTD, after["hidden"] = self.operation(log_a_BTD, b_BTD, None if state is None else state["hidden"])
        return self.finish(h_BTD, x_BTD), None if state is None else after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        into_BD = self.into(x_BD)
        if self.conv is not None:
            into_BD = self.conv.step(into_BD, state["conv"])
        log_a_BTD, b_BTD = self.gates_of(into_BD[:, None])
        h_BD, hidden_BD = self.one_step(log_a_BTD[:, 0], b_BTD[:, 0], state["hidden"])
        if hidden_BD is not state["hidden"]:
            state["hidden"].copy_(hidden_BD)
        return self.finish(h_BD, x_BD), state

    def gates_of(self, into_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """log a and the gated input sqrt(1 - a^2) i x, both in float32 or better."""
        recurrence_BTD = self.recurrence_gate(into_BTD)
        log_a_BTD = -8 * F.softplus(self.rate.to(recurrence_BTD.dtype)) * recurrence_BTD
        # 1 - a^2 without cancellation. The small term bounds the slope of the root where the gate is shut.
        scale_BTD = torch.sqrt(1e-12 - torch.expm1(2 * log_a_BTD))
        return log_a_BTD, scale_BTD * self.input_gate(into_BTD) * into_BTD

    def finish(self, h: Tensor, x: Tensor) -> Tensor:
        """Gate and output projection."""
        y: Tensor = self.out(F.gelu(self.gate(x)) * h.to(x.dtype))
        return y
