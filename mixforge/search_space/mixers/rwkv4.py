"""RWKV-4's time mixing: an average of values with weights that decay, one for each channel.

    x'_c = x_t + mu_c (x_{t-1} - x_t)    for c of r, k, v
    r_t = sigmoid(W_r x'_r),  k_t = W_k x'_k,  v_t = W_v x'_v
    wkv_t = (sum_{i<t} e^(-(t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (the same sum over ones in place of v)
    y_t = W_out (r_t wkv_t),   w = exp(decay)

The state is numerator and denominator divided by e^m and m, the largest exponent so far, m_t = max(m_{t-1} - w, k_t):

    a_t = e^(m_{t-1} - w - m_t) a_{t-1} + e^(k_t - m_t) v_t,   b_t the same with 1 in place of v_t

With m for all tokens at hand (a running maximum), both are the elementwise scan of `kernels.gated_scan`.

Source: Peng et al. 2023 (arXiv 2305.13048), equations 11 to 18 and appendix D (the state with a maximum); shapes as
in transformers' Rwkv, whose mu is 1 - mu. Departures: mu, w and u start as they do in its first layer, in every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mixforge.kernels import gated_scan
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.token_shift import TokenShift

# The exponent of a sum without terms. It is finite so that differences of two are.
EMPTY = -1e30


@dataclass(frozen=True, slots=True)
class Rwkv4(Mixer):
    """RWKV-4's time mixing. It has no genes: it is as wide as the model."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    def why_illegal(self, width: int) -> str | None:
        return None

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        params = 4 * width * width + 5 * width
        state = width * (3 * 4 + itemsize)
        return Cost(
            params=params,
            flops=8 * length * width * width,
            state_bytes=state,
            decode_bytes=params * itemsize + 2 * state,
        )

    def build(self, width: int, backend: Backend) -> Part:
        return Part(WeightedKeyValue, width=width, operation=gated_scan.form(backend))


class WeightedKeyValue(TokenMixer):
    """[B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, operation: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.operation = operation
        place = torch.arange(width) / max(1, width - 1)
        share = torch.arange(width) / width
        self.decay = nn.Parameter(-5 + 8 * place**0.7)
        self.bonus = nn.Parameter(torch.log(torch.tensor(0.3)) + 0.5 * ((torch.arange(width) + 1) % 3 - 1))
        # Of r, k and v in this order.
        self.shift = TokenShift(width, count=3, lowrank=False)
        with torch.no_grad():
            self.shift.share[0] = 1 - share.sqrt()
        self.receptance = Dense(width, width, bias=False)
        self.key = Dense(width, width, bias=False)
        self.value = Dense(width, width, bias=False)
        self.out = Dense(width, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        width = self.decay.shape[0]
        held = torch.float64 if dtype == torch.float64 else torch.float32
        sums = torch.zeros(batch, 2 * width, device=device, dtype=held)
        return {
            "past": torch.zeros(batch, width, device=device, dtype=dtype),
            "sums": sums,
            "largest": torch.full((batch, width), EMPTY, device=device, dtype=held),
        }

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        before = state or self.initial_state(x_BTD.shape[0], 0, x_BTD.device, x_BTD.dtype)
        r_BTD, k_BTD, v_BTD = self.projected(x_BTD, before["past"])
        w_D = exact(self.decay).exp()
        largest_BTD = running_largest(k_BTD.detach(), w_D.detach(), before["largest"])
        earlier_BTD = torch.cat([before["largest"][:, None], largest_BTD[:, :-1]], 1)
        write_BTD = torch.exp(k_BTD - largest_BTD)
        log_a_BTD = earlier_BTD - w_D - largest_BTD
        sums_BTF, after_BF = self.operation(
            torch.cat([log_a_BTD, log_a_BTD], -1),
            torch.cat([write_BTD * v_BTD, write_BTD], -1),
            before["sums"],
        )
        earlier_BTF = torch.cat([before["sums"][:, None], sums_BTF[:, :-1]], 1)
        y_BTD = self.finish(r_BTD, k_BTD, v_BTD, earlier_BTF, earlier_BTD)
        if state is None:
            return y_BTD, None
        return y_BTD, {"past": x_BTD[:, -1].clone(), "sums": after_BF, "largest": largest_BTD[:, -1].clone()}

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        r_BD, k_BD, v_BD = (each[:, 0] for each in self.projected(x_BD[:, None], state["past"]))
        y_BD = self.finish(r_BD, k_BD, v_BD, state["sums"], state["largest"])
        held_BD = state["largest"] - exact(self.decay).exp()
        largest_BD = torch.maximum(held_BD, k_BD)
        write_BD, keep_BD = torch.exp(k_BD - largest_BD), torch.exp(held_BD - largest_BD)
        added_BF = torch.cat([write_BD * v_BD, write_BD], -1)
        state["sums"].copy_(torch.cat([keep_BD, keep_BD], -1) * state["sums"] + added_BF)
        state["largest"].copy_(largest_BD)
        state["past"].copy_(x_BD)
        return y_BD, state

    def projected(self, x_BTD: Tensor, past_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r, and k and v in float32 or better."""
        (r, k, v), _ = self.shift(x_BTD, past_BD)
        return torch.sigmoid(self.receptance(r)), exact(self.key(k)), exact(self.value(v))

    def finish(self, r: Tensor, k: Tensor, v: Tensor, sums: Tensor, largest: Tensor) -> Tensor:
        """The average over the tokens before and this one, which has a bonus; gate and output projection."""
        above, below = sums.chunk(2, -1)
        own = exact(self.bonus) + k
        top = torch.maximum(largest, own).detach()
        keep, write = torch.exp(largest - top), torch.exp(own - top)
        average = (keep * above + write * v) / (keep * below + write)
        y: Tensor = self.out(r * average.to(r.dtype))
        return y


def running_largest(k_BTD: Tensor, w_D: Tensor, largest_BD: Tensor) -> Tensor:
    """m_t = max(m_{t-1} - w, k_t) for all tokens: with the decays taken out it is a running maximum.

    It may be off by rounding, and the sums with it: what they are divided by is the same m.
    """
    lag_TD = torch.arange(1, k_BTD.shape[1] + 1, device=k_BTD.device, dtype=k_BTD.dtype)[:, None] * w_D
    level_BTD = torch.cummax(k_BTD + lag_TD, 1).values
    return torch.maximum(level_BTD, largest_BD[:, None]) - lag_TD
