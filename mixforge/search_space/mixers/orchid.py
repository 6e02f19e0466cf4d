"""Orchid: a long convolution whose filter is made of the sequence, by a correlation that no shift changes.

    q, k, v = conv(W x),  g = W_g x
    h^c[s] = h_0[s] + (1 / cW) sum_{j < cW} q_j k_{j-s}       of the tokens before block c, s < W
    y_t = W_out (g_t * sum_{s < W} h^c[s] v_{t-s})             t in block c, of W tokens

Source: Mahdavi Karimi et al. 2024 (arXiv 2402.18508), sections 3.1 and 3.2: the filter h_0 + F^-1(F(k)^* F(q)), which is
the correlation of q and k over all lags, and the convolution under a gate.

Departures: the paper's filter is made of the whole sequence and so sees what comes. Here the sequence has blocks of
`window` tokens, and a block's filter is made of those before it: the first block has h_0 alone. Filter and correlation
reach `window` tokens; the correlation is a mean, so that it does not grow with the text; one gate, after the filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels import short_conv
from mixforge.search_space.genes import Whole
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.long_convolution import (
    ages,
    correlate,
    long_convolve,
    ring_in_order,
    write_ring,
)
from mixforge.search_space.parts.short_convolution import ShortConvolution


@dataclass(frozen=True, slots=True)
class Orchid(Mixer):
    """Orchid. Genes: the tokens of the filter and of a block that shares it, and those of the short convolution."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    window: Annotated[int, Whole(2, 65536)] = 32
    conv: Annotated[int, Whole(2, 8)] = 3

    def why_illegal(self, width: int) -> str | None:
        return None

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        products = 5 * width * width + 3 * width * self.conv
        filters = width * self.window
        params = products + filters
        conv_state = 3 * width * (self.conv - 1) * itemsize
        state = conv_state + 2 * filters * itemsize + 2 * filters * 4
        begun = 4 * filters if length % self.window == 0 else 0
        return Cost(
            params=params,
            flops=2 * length * products,
            state_bytes=state,
            # Written: a slot of both rings, the sum of products, and a block's filter at its first token.
            decode_bytes=params * itemsize + state + conv_state + 2 * width * itemsize + 4 * filters + begun,
        )

    def build(self, width: int, backend: Backend) -> Part:
        conv = Part(
            ShortConvolution,
            channels=3 * width,
            size=self.conv,
            activation="none",
            operation=short_conv.form(backend),
            one_step=short_conv.step_form(backend),
        )
        return Part(ConditionedConvolution, width=width, window=self.window, conv=conv)


class ConditionedConvolution(TokenMixer):
    """[B, T, D] -> [B, T, D].

    The state has rings of the last W keys and values, the present filter and the sum of all products so far.
    """

    def __init__(self, width: int, window: int, conv: ShortConvolution) -> None:
        super().__init__()
        self.window = window
        self.qkv = Dense(width, 3 * width, bias=False)
        self.conv = conv
        self.gate = Dense(width, width, bias=False)
        # A filter starts as an exponential of its own length in each channel.
        length = 2.0 * (window / 2) ** ((torch.arange(width) + 0.5) / width)
        self.filter = nn.Parameter(torch.exp(-torch.arange(window) / length[:, None]) / length[:, None])
        self.out = Dense(width, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        filter_DW = exact(self.filter.detach()).to(device)
        zeros_BDW = torch.zeros(batch, *filter_DW.shape, device=device, dtype=dtype)
        return {
            "key": zeros_BDW,
            "value": zeros_BDW.clone(),
            "filter": filter_DW.repeat(batch, 1, 1),
            "sum": torch.zeros(batch, *filter_DW.shape, device=device, dtype=filter_DW.dtype),
            "conv": self.conv.initial_state(batch, device, dtype),
        }

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        batch, length, _ = x_BTD.shape
        mixed, conv_BDW = self.conv(self.qkv(x_BTD), None if state is None else state["conv"])
        q_BDT, k_BDT, v_BDT = mixed.transpose(1, 2).chunk(3, 1)
        past = self.window - 1
        first_BDW = exact(self.filter).expand(batch, -1, -1)
        if state is None:
            filter_BDW, sum_BDW = first_BDW, torch.zeros_like(first_BDW)
            k_BDT, v_BDT = F.pad(k_BDT, (past, 0)), F.pad(v_BDT, (past, 0))
        else:
            filter_BDW, sum_BDW = state["filter"], state["sum"]
            before_k, before_v = (ring_in_order(state[name], at.start, past) for name in ("key", "value"))
            write_ring(state["key"], k_BDT, at.positions_T)
            write_ring(state["value"], v_BDT, at.positions_T)
            k_BDT, v_BDT = torch.cat([before_k, k_BDT], 2), torch.cat([before_v, v_BDT], 2)
        done, pieces = 0, []
        while done < length:
            position = at.start + done
            if position % self.window == 0 and position > 0:
                filter_BDW = first_BDW + sum_BDW / position
            end = min(length, done + self.window - position % self.window)
            pieces.append(long_convolve(filter_BDW, v_BDT[:, :, done : end + past], past))
            sum_BDW = sum_BDW + correlate(q_BDT[:, :, done:end], k_BDT[:, :, done : end + past], past)
            done = end
        y_BTD = self.out(self.gate(x_BTD) * torch.cat(pieces, 2).transpose(1, 2))
        if state is None:
            return y_BTD, None
        return y_BTD, {**state, "filter": filter_BDW, "sum": sum_BDW, "conv": conv_BDW}

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        q_BD, k_BD, v_BD = self.conv.step(self.qkv(x_BD), state["conv"]).chunk(3, 1)
        write_ring(state["key"], k_BD[..., None], at.positions_T)
        write_ring(state["value"], v_BD[..., None], at.positions_T)
        is_new = (at.positions_T % self.window == 0) & (at.positions_T > 0)
        fresh_BDW = exact(self.filter) + state["sum"] / at.positions_T.clamp(min=1)
        filter_BDW = torch.where(is_new, fresh_BDW, state["filter"])
        state["filter"].copy_(filter_BDW)
        # The age of each slot; and, as both are position - n modulo W, the slot of each age.
        age_W = ages(state["key"], at.positions_T)
        y_BD = (filter_BDW[:, :, age_W] * state["value"]).sum(2)
        state["sum"].add_(exact(q_BD)[..., None] * exact(state["key"])[:, :, age_W])
        return self.out(self.gate(x_BD) * y_BD.to(x_BD.dtype)), state
