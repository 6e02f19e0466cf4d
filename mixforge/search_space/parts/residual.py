"""Residual units and what is made of them: stacks, and weights that are applied several times.

    pre        x + f(norm(x))
    post       norm(x + f(x))
    sandwich   x + norm'(f(norm(x)))
    inside     x + norm(f(x))
    deep       norm(alpha x + f(x)),  alpha = M^(1/4) for M units
    gated      gate(x, relu(f(norm(x))))
    none       x + f(x)

Around several mixers (`residual(a + b)`) f is one mixer after the other, each with its own norm before it (pre, sandwich,
gated) or after it (inside, sandwich), and there is one sum, one norm after it (post, deep) or one gate. A residual among
them is x + f(x) by itself.

    gate(x, y) = (1 - z) x + z h
    r = sigmoid(W_r y + U_r x),  z = sigmoid(W_z y + U_z x - b),  h = tanh(W_g y + U_g (r x))

Sources: He et al. 2015 (arXiv 1512.03385) for the residual; Xiong et al. 2020 (arXiv 2002.04745) for `pre`
against `post`; Ding et al. 2021 (arXiv 2105.13290), section 3.2, for `sandwich`; OLMo et al. 2024 (arXiv
2501.00656), section 2.1, for `inside`; Wang et al. 2022 (arXiv 2203.00555), figure 2, for `deep` in a decoder, whose
M units are 2 N of its layers; Parisotto et al. 2019 (arXiv 1910.06764), section 3.2, for `gated`, whose b begins
at 2, so that a new unit passes on most of what it is given; Dehghani et al. 2018 (arXiv 1807.03819) for weights
applied several times (`halting` has their halting and their timing signal).

Departure: the initial gain of `deep`, which its paper gives to both matrices of a feed-forward layer and to the
value and output matrices of attention, is squared and given to the matrix that ends a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
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

    def last(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """A sequence, of which what comes out at the last token [B, D] is wanted."""
        y_BTD, after = self(x_BTD, states, at)
        return y_BTD[:, -1], after

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """One token."""
        raise NotImplementedError

    def between(self, states: list[dict[str, Tensor]], length: int) -> None:
        """What is to be done before token number `length`, from 0, is read by `step`: nothing, for most units."""


def joined(x: Tensor, y: Tensor, stream: float, gate: nn.Module | None, after: nn.Module) -> Tensor:
    """What goes on, of the residual stream and the output of a branch."""
    together: Tensor
    if gate is not None:
        together = gate(x, torch.relu(y))
        return together
    together = after((x if stream == 1.0 else stream * x) + y)
    return together


class Branch(Unit):
    """inside(mixer(before(x))): a mixer of several in one residual, without the stream.

    A norm that is not there is an `nn.Identity`.
    """

    def __init__(self, mixer: TokenMixer, before: nn.Module, inside: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.before = before
        self.inside = inside
        self.states = 1

    def initial_states(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        return [self.mixer.initial_state(batch, capacity, device, dtype)]

    def forward(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]] | None, at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        y_BTD, state = self.mixer(self.before(x_BTD), None if states is None else states[0], at)
        return self.beside(x_BTD, self.inside(y_BTD)), None if state is None else [state]

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        y_BD, state = self.mixer.step(self.before(x_BD), states[0], at)
        return self.beside(x_BD, self.inside(y_BD)), [state]

    def between(self, states: list[dict[str, Tensor]], length: int) -> None:
        self.mixer.between(states[0], length)

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """What goes on, of what came in and of what the branch says."""
        return y


class Residual(Branch):
    """after(stream x + inside(mixer(before(x)))); with a gate it is gate(x, relu(mixer(before(x))))."""

    def __init__(
        self,
        mixer: TokenMixer,
        before: nn.Module,
        inside: nn.Module,
        after: nn.Module,
        stream: float = 1.0,
        gate: nn.Module | None = None,
    ) -> None:
        super().__init__(mixer, before, inside)
        self.after = after
        self.stream = stream
        self.gate = gate

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        return joined(x, y, self.stream, self.gate, self.after)


class StreamGate(nn.Module):
    """A gated recurrent unit along depth: how much of the stream x [..., D] gives way to y [..., D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        # W_r, W_z and W_g of y; U_r and U_z of x. U_g stands alone, as it reads r x.
        self.output = Dense(width, 3 * width, bias=False)
        self.stream = Dense(width, 2 * width, bias=False)
        self.reset = Dense(width, width, bias=False)
        self.bias = nn.Parameter(torch.full((width,), 2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        r_y, z_y, h_y = self.output(y).split(self.width, -1)
        r_x, z_x = self.stream(x).split(self.width, -1)
        z = torch.sigmoid(z_y + z_x - self.bias)
        h = torch.tanh(h_y + self.reset(torch.sigmoid(r_y + r_x) * x))
        return torch.lerp(x, h, z)


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

    def last(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Units at the end that keep nothing of a token, as channel mixers and readers of a cache, see the last alone."""
        units = [self.unit(index) for index in self.order]
        ends = list(accumulate(unit.states for unit in units))
        whole = sum(any(states[end - unit.states :]) for unit, end in zip(units, ends, strict=True))
        x_BD, after = x_BTD[:, -1], list[dict[str, Tensor]]()
        for number, (unit, end) in enumerate(zip(units[:whole], ends, strict=False), start=1):
            mine = states[end - unit.states : end]
            if number == whole:
                x_BD, new = unit.last(x_BTD, mine, at)
            else:
                x_BTD, new = unit(x_BTD, mine, at)
            after += new
        alone = at.of_last()
        for unit in units[whole:]:
            x_BD, new = unit.step(x_BD, states[len(after) : len(after) + unit.states], alone)
            after += new
        return x_BD, after

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        after: list[dict[str, Tensor]] = []
        for unit in map(self.unit, self.order):
            x_BD, new = unit.step(x_BD, states[len(after) : len(after) + unit.states], at)
            after += new
        return x_BD, after

    def between(self, states: list[dict[str, Tensor]], length: int) -> None:
        begin = 0
        for unit in map(self.unit, self.order):
            unit.between(states[begin : begin + unit.states], length)
            begin += unit.states


class ResidualStack(Unit):
    """after(stream x + body(x)), or gate(x, relu(body(x))): one residual connection around several units."""

    def __init__(
        self, body: Stack, after: nn.Module, stream: float = 1.0, gate: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.gate = gate
        self.stream = stream
        self.body = body
        self.after = after
        self.states = body.states

    def initial_states(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        return self.body.initial_states(batch, capacity, device, dtype)

    def forward(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]] | None, at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        y_BTD, after = self.body(x_BTD, states, at)
        return joined(x_BTD, y_BTD, self.stream, self.gate, self.after), after

    def last(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        y_BD, after = self.body.last(x_BTD, states, at)
        return joined(x_BTD[:, -1], y_BD, self.stream, self.gate, self.after), after

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        y_BD, after = self.body.step(x_BD, states, at)
        return joined(x_BD, y_BD, self.stream, self.gate, self.after), after

    def between(self, states: list[dict[str, Tensor]], length: int) -> None:
        self.body.between(states, length)
