"""Hyena: long convolutions with implicit filters in turn with products by projections of the input.

    x^0, ..., x^{N-1}, v = N + 1 projections of x, each through a short convolution
    z <- x^n z;  z <- h^n * z + b^n z        for n = N-1, ..., 1, from z = v
    y = W_out (x^0 z)
    h^n_t = window(t) FFN(features(t))        t < W, zero beyond
    features(t) = (t/W, cos(w_j t), -sin(w_j t)), w_j = 2 pi f_j / W, f_j from 0.0001 to 15 in 16 equal steps
    window_d(t) = exp(-a_d t/W) + 0.05, a_d from ln(100)/1.5 to ln(100)/0.3 in equal steps over the channels

Source: Poli et al. 2023 (arXiv 2302.10866), definition 3.1 and section 3.3, in the form of its public code, where an
operator of order N has N - 1 long filters and the short convolution stands for the last. The FFN has three hidden
sines of one learned frequency, from 14, and `filter_width` units.

Departures: features are not trained; projections and short convolution have no biases. W is a gene, and not the longest
sequence of the training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels import short_conv
from mixforge.search_space.genes import Whole
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.long_convolution import ages, long_convolve, ring_in_order, write_ring
from mixforge.search_space.parts.short_convolution import ShortConvolution

BANDS = 16
FEATURES = 2 * BANDS + 1


@dataclass(frozen=True, slots=True)
class Hyena(Mixer):
    """Hyena. Genes: its order, the tokens of its filters and of the short convolution, and the units of the filters."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    order: Annotated[int, Whole(2, 8)] = 2
    window: Annotated[int, Whole(2, 1048576)] = 1024
    conv: Annotated[int, Whole(2, 8)] = 3
    filter_width: Annotated[int, Whole(1, 1024)] = 64

    def why_illegal(self, width: int) -> str | None:
        return None

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        filters = (self.order - 1) * width
        units = self.filter_width
        layers = FEATURES * units + 2 * units * units + units * filters
        projected = (self.order + 1) * width
        mixed = width * projected + projected * self.conv + width * width
        # Decoding keeps the filters, and reads the weights that made them no more.
        idle = layers + 4 * units
        params = mixed + filters + idle
        slots = min(length, self.window)
        conv_state = projected * (self.conv - 1) * itemsize
        slot = filters * itemsize
        state = conv_state + slots * (slot + 4 * filters)
        return Cost(
            params=params,
            flops=2 * length * mixed + 2 * slots * layers,
            state_bytes=state,
            decode_bytes=(params - idle) * itemsize + state + conv_state + slot,
            idle_params=idle,
        )

    def build(self, width: int, backend: Backend) -> Part:
        conv = Part(
            ShortConvolution,
            channels=(self.order + 1) * width,
            size=self.conv,
            activation="none",
            operation=short_conv.form(backend),
            one_step=short_conv.step_form(backend),
        )
        filters = Part(
            ImplicitFilters, filters=self.order - 1, width=width, units=self.filter_width, window=self.window
        )
        return Part(HyenaOperator, width=width, conv=conv, filters=filters)


class ImplicitFilters(nn.Module):
    """h [N - 1, D, W], in float32 or better."""

    def __init__(self, filters: int, width: int, units: int, window: int) -> None:
        super().__init__()
        self.filters = filters
        self.width = width
        self.window = window
        self.hidden = nn.ModuleList([Dense(FEATURES, units), Dense(units, units), Dense(units, units)])
        self.frequency = nn.Parameter(torch.full((units,), 14.0))
        self.last = Dense(units, filters * width, bias=False)

    def forward(self, length: int) -> Tensor:
        """The first `length` entries, at most W."""
        weight = self.last.weight
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        t_W = torch.arange(length, device=weight.device, dtype=exact)
        band_J = torch.linspace(1e-4, BANDS - 1, BANDS, device=weight.device, dtype=exact)
        angle_WJ = 2 * math.pi / self.window * t_W[:, None] * band_J
        z_WF = torch.cat([t_W[:, None] / self.window, angle_WJ.cos(), -angle_WJ.sin()], 1)
        # Sines of this frequency lose a filter that is computed in half precision.
        for layer in self.hidden:
            # Or what stands in the place of one.
            layer = cast("nn.Linear", layer)
            z_WF = torch.sin(
                self.frequency.to(exact) * F.linear(z_WF, layer.weight.to(exact), layer.bias.to(exact))
            )
        h_NDW = F.linear(z_WF, weight.to(exact)).T.reshape(self.filters, self.width, -1)
        slowest, fastest = math.log(100) / 1.5, math.log(100) / 0.3
        rate_D = torch.linspace(slowest, fastest, self.width, device=weight.device, dtype=exact)
        window_DW = torch.exp(-rate_D[:, None] * t_W / self.window) + 0.05
        return h_NDW * window_DW


class HyenaOperator(TokenMixer):
    """[B, T, D] -> [B, T, D].

    The state has the filters and, for each of them, a ring of the last W inputs of its convolution.
    """

    def __init__(self, width: int, conv: ShortConvolution, filters: ImplicitFilters) -> None:
        super().__init__()
        self.width = width
        self.projections = Dense(width, conv.weight.shape[0], bias=False)
        self.conv = conv
        self.filters = filters
        self.skip = nn.Parameter(torch.randn(filters.filters, width))
        self.out = Dense(width, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        slots = min(self.filters.window, capacity)
        with torch.no_grad():
            filter_NDW = self.filters(slots).to(device)
        past = torch.zeros(batch, self.filters.filters, self.width, slots, device=device, dtype=dtype)
        return {"filter": filter_NDW, "past": past, "conv": self.conv.initial_state(batch, device, dtype)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        projected, after_BDW = self.conv(self.projections(x_BTD), None if state is None else state["conv"])
        *x, z_BDT = projected.transpose(1, 2).chunk(self.filters.filters + 2, 1)
        window = self.filters.window
        filter_NDW = self.filters(min(window, at.start + x_BTD.shape[1]))
        for n in range(self.filters.filters):
            z_BDT = z_BDT * x[-1 - n]
            seen_BDT, past = z_BDT, 0
            if state is not None:
                ring_BDW = state["past"][:, n]
                past = min(at.start, window - 1, ring_BDW.shape[-1])
                seen_BDT = torch.cat([ring_in_order(ring_BDW, at.start, past), z_BDT], 2)
                write_ring(ring_BDW, z_BDT, at.positions_T)
            z_BDT = long_convolve(filter_NDW[n], seen_BDT, past) + self.skip[n, :, None] * z_BDT
        y_BTD = self.out((x[0] * z_BDT).transpose(1, 2))
        return y_BTD, None if state is None else {**state, "conv": after_BDW}

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        projected = self.conv.step(self.projections(x_BD), state["conv"])
        *x, z_BD = projected.chunk(self.filters.filters + 2, 1)
        age_W = ages(state["past"], at.positions_T)
        for n in range(self.filters.filters):
            z_BD = z_BD * x[-1 - n]
            ring_BDW = state["past"][:, n]
            write_ring(ring_BDW, z_BD[..., None], at.positions_T)
            # Slots that are not written yet hold zeros.
            mixed_BD = (ring_BDW * state["filter"][n][:, age_W]).sum(-1).to(z_BD.dtype)
            z_BD = mixed_BD + self.skip[n] * z_BD
        return self.out(x[0] * z_BD), state
