"""The block around a recurrence that is not linear: projections of the whole sequence, the cell, a norm, a projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.nonlinear_cells import GruCell, LstmCell, RecurrentCell
from mixforge.search_space.parts.short_convolution import ShortConvolution


class HeadNorm(nn.Module):
    """Layer norm over each head's channels, [..., H, K] -> [..., H*K], with a learned scale for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-6).flatten(-2) * self.weight


class Recurrence(TokenMixer):
    """[B, T, D] -> [B, T, D].

    whole: torch's own form of the cell over a sequence, or None. It is taken where every gate sees the same input.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        conv: ShortConvolution | None,
        cell: RecurrentCell,
        whole: Callable[..., tuple[Tensor, list[Tensor]]] | None,
        norm: HeadNorm | None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.conv = conv
        self.whole = whole
        # The gates that see the convolution's output, and the others: of all heads, head after head.
        self.early = nn.Linear(width, 2 * heads * head_dim)
        self.late = nn.Linear(width, (cell.gates - 2) * heads * head_dim)
        self.cell = cell
        self.norm = norm
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        held = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (batch, self.heads, self.head_dim)
        state = {
            name: torch.full(shape, self.cell.first(name), device=device, dtype=held)
            for name in self.cell.held
        }
        if self.conv is not None:
            state["conv"] = self.conv.initial_state(batch, device, dtype)
        return state

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        before = state or self.initial_state(x_BTD.shape[0], 0, x_BTD.device, x_BTD.dtype)
        states = [before[name] for name in self.cell.held]
        after: dict[str, Tensor] = {}
        u_BTD = x_BTD
        if self.conv is not None:
            u_BTD, after["conv"] = self.conv(x_BTD, before["conv"])
        if self.whole is not None:
            h_BTHK, last = self.whole(self, x_BTD, states)
        else:
            h_BTHK, last = self.cell(self.gates_of(u_BTD, x_BTD), states)
        after |= dict(zip(self.cell.held, last, strict=True))
        return self.finish(h_BTHK.to(x_BTD.dtype)), None if state is None else after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        u_BD = x_BD if self.conv is None else self.conv.step(x_BD, state["conv"])
        states = [state[name].transpose(0, 1) for name in self.cell.held]
        gates_HBF = exact(self.gates_of(u_BD, x_BD)).transpose(0, 1)
        after = self.cell.advance(gates_HBF, exact(self.cell.recurrent), states)
        for held, new in zip(states, after, strict=True):
            held.copy_(new)
        return self.finish(after[0].transpose(0, 1).to(x_BD.dtype)), state

    def gates_of(self, u: Tensor, x: Tensor) -> Tensor:
        """[..., H, G K]."""
        parts = [part.reshape(*part.shape[:-1], self.heads, -1) for part in (self.early(u), self.late(x))]
        return torch.cat(parts, -1)

    def finish(self, h: Tensor) -> Tensor:
        """Norm and output projection of [..., H, K]."""
        y: Tensor = self.out(h.flatten(-2) if self.norm is None else self.norm(h))
        return y


def whole_lstm(block: Recurrence, x_BTD: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A sequence by torch's own LSTM, which has one head."""
    weight, bias = (
        torch.cat([block.early.weight, block.late.weight]),
        torch.cat([block.early.bias, block.late.bias]),
    )
    assert isinstance(block.cell, LstmCell)
    flat = [weight, block.cell.recurrent[0].t(), bias, torch.zeros_like(bias)]
    first = [state.transpose(0, 1).contiguous() for state in states]
    h_BTD, *last = torch.lstm(
        exact(x_BTD), first, [exact(each) for each in flat], True, 1, 0.0, False, False, True
    )
    return h_BTD[:, :, None], [state.transpose(0, 1) for state in last]


def whole_gru(block: Recurrence, x_BTD: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A sequence by torch's own GRU, which has one head."""
    weight, bias = (
        torch.cat([block.early.weight, block.late.weight]),
        torch.cat([block.early.bias, block.late.bias]),
    )
    assert isinstance(block.cell, GruCell)
    own = torch.cat([torch.zeros_like(block.early.bias), block.cell.bias[0]])
    flat = [weight, block.cell.recurrent[0].t(), bias, own]
    h_BTD, last = torch.gru(
        exact(x_BTD),
        states[0].transpose(0, 1).contiguous(),
        [exact(each) for each in flat],
        True,
        1,
        0.0,
        False,
        False,
        True,
    )
    return h_BTD[:, :, None], [last.transpose(0, 1)]
