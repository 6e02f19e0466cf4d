"""The block around a linear recurrence: what comes before its cell, the scan, the gate behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.gated_cells import Gated
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.predecessor import last_tokens
from mixforge.search_space.parts.short_convolution import ShortConvolution


class LinearRecurrence(TokenMixer):
    """[B, T, D] -> [B, T, D]; what its genes leave out is None.

    into: a projection before the convolution. looks_back: tokens before its own that the cell and the gate see whole.
    features: E, or 2 E where the recurrence is complex: real parts, then imaginary ones.
    """

    def __init__(
        self,
        width: int,
        features: int,
        is_complex: bool,
        looks_back: int,
        into: nn.Module | None,
        conv: ShortConvolution | None,
        cell: nn.Module,
        gate: nn.Module | None,
        activation: Callable[[Tensor], Tensor] | None,
        norm: nn.Module | None,
        has_skip: bool,
        bias: bool,
        operation: Callable[..., tuple[Tensor, Tensor]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.width, self.features = width, features
        self.is_complex = is_complex
        self.looks_back = looks_back
        self.activation = activation
        self.operation = operation
        self.one_step = one_step
        self.gate = gate
        self.into = into
        self.conv = conv
        self.cell = cell
        self.norm = norm
        self.skip = nn.Parameter(torch.randn(width)) if has_skip else None
        self.out = Dense(features, width, bias=bias)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        held = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (batch, 2, self.features // 2) if self.is_complex else (batch, self.features)
        state = {"hidden": torch.zeros(shape, device=device, dtype=held)}
        if self.looks_back > 0:
            state["past"] = self.no_past(batch, device, dtype)
        if self.conv is not None:
            state["conv"] = self.conv.initial_state(batch, device, dtype)
        return state

    def no_past(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tokens before the first one, which are zeros."""
        return torch.zeros(batch, self.looks_back, self.width, device=device, dtype=dtype)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        after: dict[str, Tensor] = {}
        seen_BTF = x_BTD
        if self.looks_back > 0:
            past_BWD = (
                self.no_past(x_BTD.shape[0], x_BTD.device, x_BTD.dtype) if state is None else state["past"]
            )
            seen_BTF, after["past"] = last_tokens(x_BTD, past_BWD)
        u_BTF = seen_BTF if self.into is None else self.into(seen_BTF)
        if self.conv is not None:
            u_BTF, after["conv"] = self.conv(u_BTF, None if state is None else state["conv"])
        hidden = None if state is None else state["hidden"]
        h, after["hidden"] = self.operation(*gates(self.cell(u_BTF, at.positions_T)), hidden)
        h_BTF = h.flatten(2) if self.is_complex else h
        return self.finish(h_BTF, seen_BTF, x_BTD), None if state is None else after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        seen_BF = x_BD
        if self.looks_back > 0:
            seen_BTF, past_BWD = last_tokens(x_BD[:, None], state["past"])
            seen_BF = seen_BTF[:, 0]
            state["past"].copy_(past_BWD)
        u_BF = seen_BF if self.into is None else self.into(seen_BF)
        if self.conv is not None:
            u_BF = self.conv.step(u_BF, state["conv"])
        gated = gates(self.cell(u_BF[:, None], at.positions_T))
        h, hidden = self.one_step(*(each[:, 0] for each in gated), state["hidden"])
        if hidden is not state["hidden"]:
            state["hidden"].copy_(hidden)
        return self.finish(h.flatten(1), seen_BF, x_BD), state

    def finish(self, h: Tensor, seen: Tensor, x: Tensor) -> Tensor:
        """Gate, norm, output projection and skip."""
        h = h.to(x.dtype)
        if self.gate is not None and self.activation is not None:
            h = self.activation(self.gate(seen)) * h
        if self.norm is not None:
            h = self.norm(h)
        y: Tensor = self.out(h)
        return y if self.skip is None else y + self.skip * x


def gates(gated: Gated) -> tuple[Tensor, ...]:
    """The arguments of the scan: log |a|, the phase where there is one, and b."""
    return tuple(each for each in gated if each is not None)
