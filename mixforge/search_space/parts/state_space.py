"""The state-space part of a block: N numbers for each of its F channels, selective (S6) or fixed (S4D, moving averages).

Each scan reads u_BTF, [B, T, F], and gives y_BTF, what the block's gate is to add (None but for a fixed point) and
its state after, under the names of `initial_state`. Steps write into the state that they are given.

Sources: see `mixers.ssm`, and for moving averages `mixers.gau`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.decay import draw_dt_bias, exact
from mixforge.search_space.parts.dense import Dense


class StateSpace(nn.Module):
    """What a block asks of its scan. Abstract."""

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The state before the first token."""
        raise NotImplementedError

    def forward(
        self, u_BTF: Tensor, state: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """A sequence: (y_BTF, what the gate is to add, the state after; of no meaning where none was given)."""
        raise NotImplementedError

    def step(self, u_BF: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """One token."""
        raise NotImplementedError


class Selection(nn.Module):
    """dt, B and C of the input, dt of low rank; with the rates A and the skip D that they are used with."""

    def __init__(self, channels: int, states: int, rank: int, norms: list[nn.Module]) -> None:
        super().__init__()
        self.sizes = [rank, states, states]
        self.selection = Dense(channels, sum(self.sizes), bias=False)
        # Of dt, B and C in this order, or none.
        self.norms = nn.ModuleList(norms)
        self.step_size = Dense(rank, channels, bias=False)
        self.bias = nn.Parameter(draw_dt_bias(channels))
        self.rate = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels))
        nn.init.uniform_(self.step_size.weight, -(rank**-0.5), rank**-0.5)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., F] -> dt [..., F] in float32 or better, B and C [..., N]."""
        parts = self.selection(u).split(self.sizes, -1)
        if len(self.norms) > 0:
            parts = tuple(norm(part) for norm, part in zip(self.norms, parts, strict=True))
        low, b, c = parts
        return F.softplus(exact(self.step_size(low)) + exact(self.bias)), b, c

    def rates(self) -> Tensor:
        """A = -exp(rate) [F, N]."""
        return -exact(self.rate).exp()


class SelectiveScan(StateSpace):
    """S6: dt, B and C follow from the input."""

    def __init__(
        self,
        selection: Selection,
        operation: Callable[..., tuple[Tensor, Tensor]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.selection = selection
        self.operation = operation
        self.one_step = one_step

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"hidden": zero_state(batch, self.selection.rate.shape, device, dtype)}

    def forward(
        self, u_BTF: Tensor, state: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        part = self.selection
        dt_BTF, b_BTN, c_BTN = part(u_BTF)
        hidden = None if state is None else state["hidden"]
        y_BTF, after = self.operation(u_BTF, dt_BTF, part.rates(), b_BTN, c_BTN, part.skip, hidden)
        return y_BTF, None, {"hidden": after}

    def step(self, u_BF: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        part = self.selection
        dt_BF, b_BN, c_BN = part(u_BF)
        y_BF, after = self.one_step(u_BF, dt_BF, part.rates(), b_BN, c_BN, part.skip, state["hidden"])
        if after is not state["hidden"]:
            state["hidden"].copy_(after)
        return y_BF, None


class FixedScan(StateSpace):
    """h_t = a h_{t-1} + u_t and y_t = Re c . h_t + skip u_t, where nothing follows from the input. Abstract."""

    skip: nn.Parameter
    shape: tuple[int, int, int]
    """Of what is kept of a sequence: channels, numbers, planes."""
    operation: Callable[..., tuple[Tensor, Tensor | None]]
    one_step: Callable[..., tuple[Tensor, Tensor]]

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"hidden": zero_state(batch, self.shape, device, dtype)}

    def forward(
        self, u_BTF: Tensor, state: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        hidden = None if state is None else state["hidden"]
        y_BTF, after = self.operation(u_BTF, *self.discrete(), hidden)
        return y_BTF + self.skip * u_BTF, None, {} if after is None else {"hidden": after}

    def step(self, u_BF: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        y_BF, after = self.one_step(u_BF, *self.discrete(), state["hidden"])
        if after is not state["hidden"]:
            state["hidden"].copy_(after)
        return y_BF + self.skip * u_BF, None

    def discrete(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """log |a| and the angle of a [F, P], and c [F, P, planes]; no angle and one plane where all is real."""
        raise NotImplementedError


class DiagonalScan(FixedScan):
    """S4D: a = exp(dt A) does not depend on the input; A is real, or N/2 pairs of conjugate complex numbers."""

    def __init__(
        self,
        channels: int,
        states: int,
        is_complex: bool,
        operation: Callable[..., tuple[Tensor, Tensor | None]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.operation = operation
        self.one_step = one_step
        self.is_complex = is_complex
        poles = states // 2 if is_complex else states
        self.shape = (channels, poles, 2 if is_complex else 1)
        dt = torch.empty(channels).uniform_(math.log(0.001), math.log(0.1))
        self.step_size = nn.Parameter(dt)
        if is_complex:
            self.rate = nn.Parameter(torch.full((channels, poles), math.log(0.5)))
            self.frequency = nn.Parameter((math.pi * torch.arange(poles)).repeat(channels, 1))
            self.weight = nn.Parameter(torch.randn(channels, poles, 2) / math.sqrt(2))
        else:
            self.rate = nn.Parameter(torch.log(torch.arange(1.0, poles + 1)).repeat(channels, 1))
            self.weight = nn.Parameter(torch.randn(channels, poles, 1))
        self.skip = nn.Parameter(torch.randn(channels))

    def discrete(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """dt Re A and dt Im A [F, P], and C (exp(dt A) - 1) / A [F, P, planes], which is C B for B = 1."""
        dt_F1 = exact(self.step_size).exp()[:, None]
        real = -exact(self.rate).exp()
        if not self.is_complex:
            return dt_F1 * real, None, exact(self.weight) * (torch.expm1(dt_F1 * real) / real)[..., None]
        frequency = exact(self.frequency)
        magnitude, angle = torch.exp(dt_F1 * real), dt_F1 * frequency
        p, q = magnitude * angle.cos() - 1, magnitude * angle.sin()
        square = real.square() + frequency.square()
        held = torch.stack([(p * real + q * frequency) / square, (q * real - p * frequency) / square], -1)
        # A pair of conjugates gives twice the real part of one.
        (a, b), (c, d) = (2 * exact(self.weight)).unbind(-1), held.unbind(-1)
        return dt_F1 * real, angle, torch.stack([a * c - b * d, a * d + b * c], -1)


class MovingAverage(FixedScan):
    """The damped moving averages of arXiv 2209.10655, equation 4, of `states` expansions b u of each channel:

    h_t = p b u_t + (1 - p d) h_{t-1},  y_t = e . h_t / sqrt(N) + w u_t,  p and d between 0 and 1

    First values are those of the paper's code.
    """

    def __init__(
        self,
        channels: int,
        states: int,
        operation: Callable[..., tuple[Tensor, Tensor | None]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.operation = operation
        self.one_step = one_step
        self.shape = (channels, states, 1)
        self.average = nn.Parameter(0.2 * torch.randn(channels, states))
        self.damping = nn.Parameter(0.2 * torch.randn(channels, states))
        sign = 1.0 - 2 * (torch.arange(states) % 2)
        self.expansion = nn.Parameter(sign + 0.02 * torch.randn(channels, states))
        self.weight = nn.Parameter(torch.randn(channels, states))
        self.skip = nn.Parameter(torch.randn(channels))

    def discrete(self) -> tuple[Tensor, Tensor | None, Tensor]:
        p_FP, d_FP = torch.sigmoid(exact(self.average)), torch.sigmoid(exact(self.damping))
        c_FP = p_FP * exact(self.expansion) * exact(self.weight) / math.sqrt(self.shape[1])
        return torch.log1p(-p_FP * d_FP), None, c_FP[..., None]


def zero_state(
    batch: int, shape: tuple[int, ...] | torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Zeros [B, ...] in float32, or in float64 where that is asked for."""
    held = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros(batch, *shape, device=device, dtype=held)
