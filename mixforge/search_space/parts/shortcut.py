"""Stacks in which a unit reads more than the unit before it.

    average     Y_i = sum_{j <= i} a_ij X_j,  X_{i+1} = unit_{i+1}(Y_i),  X_0 the embedding; Y_n is what goes on
    attention   Y = X_n + W_o softmax_j(q . k_j / sqrt(K)) v_j over the depths j = 0 to n of one token,
                q = W_q norm(X_n), k_j = W_k norm(X_j), v_j = W_v norm(X_j), in heads

Sources: Pagliardini et al. 2024 (arXiv 2402.02622), section 3.1, for `average`, whose a begin as those of a stack
without shortcuts; Verma and Pilanci 2024 (arXiv 2409.10870) for attention to earlier depths at the end of the stack.

Departures: the paper of `average` averages after each transformer block, here it is after each unit of the stack. That
of `attention` passes each depth through a small network and lets the last layer attend to the depths of all tokens
before; here the last layer's own attention has seen those, and a token attends to its own depths alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, split_heads
from mixforge.search_space.parts.residual import Unit


class ShortcutStack(Unit):
    """Units one after the other; `mix` makes the input of the next one of all outputs so far, the embedding first."""

    def __init__(self, units: Sequence[Unit], mix: nn.Module) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.mix = mix
        self.states = sum(unit.states for unit in units)

    def unit(self, index: int) -> Unit:
        unit = self.units[index]
        assert isinstance(unit, Unit)
        return unit

    def initial_states(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        each = [
            self.unit(index).initial_states(batch, capacity, device, dtype)
            for index in range(len(self.units))
        ]
        return [state for states in each for state in states]

    def forward(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]] | None, at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        after: list[dict[str, Tensor]] = []
        depths = [x_BTD]
        for unit in map(self.unit, range(len(self.units))):
            mine = None if states is None else states[len(after) : len(after) + unit.states]
            y_BTD, new = unit(x_BTD, mine, at)
            after += new or []
            depths.append(y_BTD)
            x_BTD = self.mix(depths)
        return x_BTD, None if states is None else after

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        after: list[dict[str, Tensor]] = []
        depths = [x_BD]
        for unit in map(self.unit, range(len(self.units))):
            y_BD, new = unit.step(x_BD, states[len(after) : len(after) + unit.states], at)
            after += new
            depths.append(y_BD)
            x_BD = self.mix(depths)
        return x_BD, after

    def between(self, states: list[dict[str, Tensor]], length: int) -> None:
        begin = 0
        for unit in map(self.unit, range(len(self.units))):
            unit.between(states[begin : begin + unit.states], length)
            begin += unit.states


class DepthAverage(nn.Module):
    """Weights a_i of the depths 0 to i, for each depth i from 1 to `units`."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.tensor([0.0] * depth + [1.0])) for depth in range(1, units + 1)
        )

    def forward(self, depths: list[Tensor]) -> Tensor:
        weights: Tensor = self.weights[len(depths) - 2]
        y = weights[0] * depths[0]
        for weight, x in zip(weights[1:], depths[1:], strict=True):
            y = torch.addcmul(y, weight, x)
        return y


class DepthAttention(nn.Module):
    """Attention of a token to its own depths, after unit number `units`; before that the last depth goes on."""

    def __init__(self, width: int, heads: int, units: int, norm: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.units = units
        self.norm = norm
        self.query = Dense(width, width, bias=False)
        self.memory = Dense(width, 2 * width, bias=False)
        self.out = Dense(width, width, bias=False)

    def forward(self, depths: list[Tensor]) -> Tensor:
        if len(depths) <= self.units:
            return depths[-1]
        normed = self.norm(torch.stack(depths, -2))
        q_HK = split_heads(self.query(normed[..., -1, :]), self.heads)
        k_HJK, v_HJK = (
            split_heads(part, self.heads).transpose(-3, -2) for part in self.memory(normed).chunk(2, -1)
        )
        scores_HJ = (k_HJK @ q_HK[..., None])[..., 0] * q_HK.shape[-1] ** -0.5
        read_HK = (scores_HJ.softmax(-1)[..., None, :] @ v_HJK)[..., 0, :]
        y: Tensor = depths[-1] + self.out(read_HK.flatten(-2))
        return y
