"""Weights applied several times to a token, with a signal of the time and with adaptive halting.

    signal   application t = 1, 2, ... reads x + P^t,  P^t_{2j} = sin(t / 10000^(2j/D)), P^t_{2j+1} = cos(the same)
    halt     p^t = sigmoid(w . x^t + b) of what application t reads, u^t what it gives
             N the first t with p^1 + ... + p^t > 1 - eps, at most the number of applications
             y = sum_{t < N} p^t u^t + R u^N,  R = 1 - sum_{t < N} p^t

Each token halts by itself; the layers inside see a token that has halted as it was when it halted. The loss of training
has `PONDER` times the mean over tokens of N + R added to it, whose gradient is that of R.

Sources: Dehghani et al. 2018 (arXiv 1807.03819), section 2.1 for the signal and 2.2 with appendix C for halting of
each token by p of what an application reads, eps = 0.01, b begins at 1; Graves 2016 (arXiv 1603.08983), equations 5 to
13 for N, R, the weights and the loss.

Departures: appendix C mixes y <- w u^t + (1 - w) y, whose weights are not those of equation 13, runs on a token after
it has halted, against the paper's own text, and leaves off the remainder at the last application; here equation 13
holds. P^t has no part for the position, which the mixers know.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.residual import Unit
from mixforge.search_space.parts.routing import AttachLoss

PONDER = 0.01
_EPS = 0.01


class Recurrence(Unit):
    """A body applied `times` times, each application with states of its own."""

    def __init__(
        self, body: Unit, times: int, signal: nn.Module | None = None, halting: Halting | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.times = times
        self.signal = signal
        self.halting = halting
        self.states = times * body.states

    def initial_states(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        each = [self.body.initial_states(batch, capacity, device, dtype) for _ in range(self.times)]
        return [state for states in each for state in states]

    def forward(
        self, x_BTD: Tensor, states: list[dict[str, Tensor]] | None, at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        after: list[dict[str, Tensor]] = []
        tally: list[Tensor] = []
        for time in range(self.times):
            read_BTD = self.read(x_BTD, time)
            mine = None if states is None else states[len(after) : len(after) + self.body.states]
            u_BTD, new = self.body(read_BTD, mine, at)
            after += new or []
            x_BTD, tally = self.onward(x_BTD, read_BTD, u_BTD, tally, time)
        return self.answer(x_BTD, tally), None if states is None else after

    def step(
        self, x_BD: Tensor, states: list[dict[str, Tensor]], at: Pass
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        after: list[dict[str, Tensor]] = []
        tally: list[Tensor] = []
        for time in range(self.times):
            read_BD = self.read(x_BD, time)
            u_BD, new = self.body.step(read_BD, states[len(after) : len(after) + self.body.states], at)
            after += new
            x_BD, tally = self.onward(x_BD, read_BD, u_BD, tally, time)
        return self.answer(x_BD, tally), after

    def between(self, states: list[dict[str, Tensor]], length: int) -> None:
        for time in range(self.times):
            self.body.between(states[time * self.body.states : (time + 1) * self.body.states], length)

    def read(self, x: Tensor, time: int) -> Tensor:
        """What application `time`, from 0, reads."""
        if self.signal is None:
            return x
        read: Tensor = self.signal(x, time)
        return read

    def onward(
        self, x: Tensor, read: Tensor, u: Tensor, tally: list[Tensor], time: int
    ) -> tuple[Tensor, list[Tensor]]:
        """What the next application is given, and the tally of halting."""
        if self.halting is None:
            return u, tally
        onward: tuple[Tensor, list[Tensor]] = self.halting(x, read, u, tally, time == self.times - 1)
        return onward

    def answer(self, x: Tensor, tally: list[Tensor]) -> Tensor:
        """What comes out after the last application."""
        return x if self.halting is None else self.halting.answer(tally)


class TimeSignal(nn.Module):
    """x + P^t, with t counted from 1."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        half = (width + 1) // 2
        rates = torch.tensor([10000.0 ** (-2 * j / width) for j in range(half)], dtype=torch.float64)
        angles = torch.arange(1, times + 1, dtype=torch.float64)[:, None] * rates
        waves = torch.empty(times, half, 2)
        waves[..., 0], waves[..., 1] = angles.sin(), angles.cos()
        self.register_buffer("waves", waves.flatten(1)[:, :width], persistent=False)
        self.waves: Tensor

    def forward(self, x: Tensor, time: int) -> Tensor:
        return x + self.waves[time]


class Halting(nn.Module):
    """Which tokens go on, and the sum of what they have been given.

    The tally: the sum of weighted outputs [..., D], the sum of p [..., 1], whether a token goes on [..., 1], and the
    part of N + R that has a gradient [..., 1].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = Dense(width, 1)
        nn.init.ones_(self.score.bias)

    def forward(
        self, x: Tensor, read: Tensor, u: Tensor, tally: list[Tensor], is_last: bool
    ) -> tuple[Tensor, list[Tensor]]:
        p = torch.sigmoid(self.score(read))
        if not tally:
            tally = [torch.zeros_like(u), torch.zeros_like(p), torch.ones_like(p, dtype=torch.bool)]
            tally.append(torch.zeros_like(p))
        y, total, goes_on, remainder = tally
        halts = goes_on if is_last else goes_on & (total + p > 1 - _EPS)
        rests = goes_on & ~halts
        weight = torch.where(halts, 1 - total, torch.where(rests, p, 0.0))
        remainder = torch.where(halts, 1 - total, remainder)
        y = y + weight * u
        return torch.where(goes_on, u, x), [y, torch.where(rests, total + p, total), rests, remainder]

    def answer(self, tally: list[Tensor]) -> Tensor:
        """The weighted sum; in training it carries the loss of pondering."""
        y, _, _, remainder = tally
        if not (self.training and torch.is_grad_enabled()):
            return y
        attached: Tensor = AttachLoss.apply(y, PONDER * remainder.mean())  # type: ignore[no-untyped-call]
        return attached
