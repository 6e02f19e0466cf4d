"""The block around a recurrence that is not linear: projections of the whole sequence, the cell, a norm, a projection."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.short_convolution import ShortConvolution


class HeadNorm(nn.Module):
    """Layer norm over each head's channels, [..., H, K] -> [..., H*K], with a learned scale for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-6).flatten(-2) * self.weight


class RecurrentWeights(nn.Module):
    """What the last output gives the gates: matrices [H, K, F] for F = G K of G gates, and for a GRU a bias [H, K]."""

    def __init__(self, heads: int, head_dim: int, gates: int, has_bias: bool) -> None:
        super().__init__()
        shape = (heads, head_dim, gates * head_dim)
        self.recurrent = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim)) if has_bias else None


class Recurrence(TokenMixer):
    """[B, T, D] -> [B, T, D].

    first: what each of a head's states is before the first token, the output first.
    operation, one_step: the cell over a sequence and over a token.
    whole: torch's own form of the cell over a sequence, or None. It is taken where every gate sees the same input.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        conv: ShortConvolution | None,
        gates: int,
        first: list[float],
        cell: RecurrentWeights,
        operation: Callable[..., tuple[Tensor, Tensor]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
        whole: Callable[..., tuple[Tensor, Tensor]] | None,
        norm: HeadNorm | None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.first = heads, head_dim, first
        self.conv = conv
        self.operation, self.one_step = operation, one_step
        self.whole = whole
        # The gates that see the convolution's output, and the others: of all heads, head after head.
        self.early = Dense(width, 2 * heads * head_dim)
        self.late = Dense(width, (gates - 2) * heads * head_dim)
        self.cell = cell
        self.norm = norm
        self.out = Dense(heads * head_dim, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        held = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (batch, len(self.first), self.heads, self.head_dim)
        state = {"cell": torch.zeros(shape, device=device, dtype=held)}
        for number, value in enumerate(self.first):
            if value != 0:
                state["cell"][:, number] = value
        if self.conv is not None:
            state["conv"] = self.conv.initial_state(batch, device, dtype)
        return state

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        before = state or self.initial_state(x_BTD.shape[0], 0, x_BTD.device, x_BTD.dtype)
        after: dict[str, Tensor] = {}
        u_BTD = x_BTD
        if self.conv is not None:
            u_BTD, after["conv"] = self.conv(x_BTD, before["conv"])
        if self.whole is not None:
            h_BTHK, after["cell"] = self.whole(self, x_BTD, before["cell"])
        else:
            h_BTHK, after["cell"] = self.operation(
                self.gates_of(u_BTD, x_BTD), self.cell.recurrent, self.cell.bias, before["cell"]
            )
        return self.finish(h_BTHK.to(x_BTD.dtype)), None if state is None else after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        u_BD = x_BD if self.conv is None else self.conv.step(x_BD, state["conv"])
        gates_BHF = self.gates_of(u_BD, x_BD)
        h_BHK, after_BSHK = self.one_step(gates_BHF, self.cell.recurrent, self.cell.bias, state["cell"])
        if after_BSHK is not state["cell"]:
            state["cell"].copy_(after_BSHK)
        return self.finish(h_BHK.to(x_BD.dtype)), state

    def gates_of(self, u: Tensor, x: Tensor) -> Tensor:
        """[..., H, G K]."""
        parts = [part.reshape(*part.shape[:-1], self.heads, -1) for part in (self.early(u), self.late(x))]
        return torch.cat(parts, -1)

    def finish(self, h: Tensor) -> Tensor:
        """Norm and output projection of [..., H, K]."""
        y: Tensor = self.out(h.flatten(-2) if self.norm is None else self.norm(h))
        return y


def whole_lstm(block: Recurrence, x_BTD: Tensor, state_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    """A sequence by torch's own LSTM, which has one head."""
    weight, bias = of_input(block)
    flat = [weight, block.cell.recurrent[0].t(), bias, torch.zeros_like(bias)]
    first = [state.contiguous() for state in state_BSHK.permute(1, 2, 0, 3).unbind(0)]
    h_BTD, *last = torch.lstm(
        exact(x_BTD), first, [exact(each) for each in flat], True, 1, 0.0, False, False, True
    )
    # Traced by torch 2.11, the last states have one axis too many.
    last_SHBK = torch.stack([each.view_as(first[0]) for each in last])
    return h_BTD[:, :, None], last_SHBK.permute(2, 0, 1, 3).contiguous()


def whole_gru(block: Recurrence, x_BTD: Tensor, state_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    """A sequence by torch's own GRU, which has one head."""
    assert block.cell.bias is not None
    weight, bias = of_input(block)
    own = torch.cat([torch.zeros_like(block.early.bias), block.cell.bias[0]])
    flat = [weight, block.cell.recurrent[0].t(), bias, own]
    first = state_BSHK[:, 0].transpose(0, 1).contiguous()
    h_BTD, last = torch.gru(
        exact(x_BTD), first, [exact(each) for each in flat], True, 1, 0.0, False, False, True
    )
    return h_BTD[:, :, None], last.transpose(0, 1)[:, None]


def of_input(block: Recurrence) -> tuple[Tensor, Tensor]:
    """Weight and bias of what the input gives all gates."""
    parts = block.early, block.late
    return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
