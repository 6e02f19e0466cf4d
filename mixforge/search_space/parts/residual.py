"""Residual units and what is made of them: stacks, and weights that are applied several times.

    pre        x + f(norm(x))
    post       norm(x + f(x))
    sandwich   x + norm'(f(norm(x)))

Sources: He et al. 2015 (arXiv 1512.03385) for the residual; Xiong et al. 2020 (arXiv 2002.04745) for `pre`
against `post`; Ding et al. 2021 (arXiv 2105.13290), section 3.2, for `sandwich`; Dehghani et al. 2018
(arXiv 1807.03819) for weights applied several times, here without halting and without a timing signal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.layer import Pass, TokenMixer


class Unit(nn.Module):
    """One residual unit or several. Abstract.

    Its states are a list with one dictionary for each application of a residual unit, in the order of
    application.
    """

    states: int
    """How many there are."""

    def initial_states(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        """The states before the first token; see `TokenMixer.initial_state`."""
        raise NotImplementedError

    def forward(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]] | None, at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        """A sequence; without states (training) none are returned."""
        raise NotImplementedError

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """One token."""
        raise NotImplementedError


class Residual(Unit):
    """after(x + inside(mixer(before(x)))), where a norm that is not there is an `nn.Identity`."""

    def __init__(self, mixer: TokenMixer, before: nn.Module, inside: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.before = before
        self.inside = inside
        self.after = after
        self.states = 1

    def initial_states(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        return [self.mixer.initial_state(batch, capacity, device, dtype)]

    def forward(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]] | None, at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        y_BTD, state = self.mixer(self.before(x_BTD), None if states is None else states[0], at)
        return self.after(x_BTD + self.inside(y_BTD)), None if state is None else [state]

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        y_BD, state = self.mixer.step(self.before(x_BD), states[0], at)
        return self.after(x_BD + self.inside(y_BD)), [state]


class Stack(Unit):
    """Units one after the other, the whole of them `times` times with the same weights (`n @ a`)."""

    def __init__(self, units: Sequence[Unit], times: int = 1) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.order = [index for _ in range(times) for index in range(len(units))]
        self.states = times * sum(unit.states for unit in units)

    def unit(self, index: int) -> Unit:
        unit = self.units[index]
        assert isinstance(unit, Unit)
        return unit

    def initial_states(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        each = [self.unit(index).initial_states(batch, capacity, device, dtype) for index in self.order]
        return [state for states in each for state in states]

    def forward(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]] | None, at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        after: list[dict[str, Tensor]] = []
        for unit in map(self.unit, self.order):
            mine = None if states is None else states[len(after) : len(after) + unit.states]
            x_BTD, new = unit(x_BTD, mine, at)
            after += new or []
        return x_BTD, None if states is None else after

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        after: list[dict[str, Tensor]] = []
        for unit in map(self.unit, self.order):
            x_BD, new = unit.step(x_BD, states[len(after) : len(after) + unit.states], at)
            after += new
        return x_BD, after
