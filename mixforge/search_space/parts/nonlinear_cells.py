"""Cells of recurrences that are not linear: the next state needs the last output, so time is walked token by token.

A cell reads what the input gives its gates, gates_BTHF [B, T, H, G K], G gates for each of K channels of H heads, and
states [B, H, K]. What the last output gives them is a product with a matrix for each head, [H, K, G K]. All is float32
or better. Equations and sources: see `mixers.rnn`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact

# The exponent of a sum without terms. It is finite so that differences of two are.
EMPTY = -1e30


class RecurrentCell(nn.Module):
    """Abstract. `held` names its states, the output first; `gates` is G, of which the first two close and open."""

    held: tuple[str, ...]
    gates: int

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        shape = (heads, head_dim, self.gates * head_dim)
        self.recurrent = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(head_dim))

    def first(self, name: str) -> float:
        """What a state is before the first token."""
        return 0.0

    def advance(self, gates_HBF: Tensor, recurrent_HKF: Tensor, states: list[Tensor]) -> list[Tensor]:
        """One token: the states after it, all [H, B, K]."""
        raise NotImplementedError

    def forward(self, gates_BTHF: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A sequence: the outputs [B, T, H, K], and the states after it."""
        recurrent_HKF = exact(self.recurrent)
        states = [state.transpose(0, 1) for state in states]
        outputs = []
        for gates_HBF in exact(gates_BTHF).permute(1, 2, 0, 3).unbind(0):
            states = self.advance(gates_HBF, recurrent_HKF, states)
            outputs.append(states[0])
        return torch.stack(outputs).permute(2, 0, 1, 3), [state.transpose(0, 1) for state in states]


class LstmCell(RecurrentCell):
    """c = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c). Gates are i, f, g, o."""

    held = ("hidden", "cell")
    gates = 4

    def advance(self, gates_HBF: Tensor, recurrent_HKF: Tensor, states: list[Tensor]) -> list[Tensor]:
        hidden, cell = states
        i, f, g, o = torch.baddbmm(gates_HBF, hidden, recurrent_HKF).chunk(4, -1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(cell), cell]


class GruCell(RecurrentCell):
    """h = (1 - z) n + z h, n = tanh(n_x + r (R_n h + b)), r and z sigmoids. Gates are r, z, n."""

    held = ("hidden",)
    gates = 3

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def advance(self, gates_HBF: Tensor, recurrent_HKF: Tensor, states: list[Tensor]) -> list[Tensor]:
        (hidden,) = states
        r, z, n = gates_HBF.chunk(3, -1)
        r_h, z_h, n_h = torch.bmm(hidden, recurrent_HKF).chunk(3, -1)
        n = torch.tanh(n + torch.sigmoid(r + r_h) * (n_h + exact(self.bias)[:, None]))
        return [torch.lerp(n, hidden, torch.sigmoid(z + z_h))]


class SlstmCell(RecurrentCell):
    """Exponential gates, divided by e^m: c = f' c + i' tanh(z), n = f' n + i', h = sigmoid(o) c / n. Gates i, f, z, o."""

    held = ("hidden", "cell", "sum", "largest")
    gates = 4

    def first(self, name: str) -> float:
        return EMPTY if name == "largest" else 0.0

    def advance(self, gates_HBF: Tensor, recurrent_HKF: Tensor, states: list[Tensor]) -> list[Tensor]:
        hidden, cell, total, largest = states
        i, f, z, o = torch.baddbmm(gates_HBF, hidden, recurrent_HKF).chunk(4, -1)
        kept = F.logsigmoid(f) + largest
        # The outputs do not depend on m.
        top = torch.maximum(kept, i).detach()
        keep, enter = torch.exp(kept - top), torch.exp(i - top)
        cell = keep * cell + enter * torch.tanh(z)
        total = keep * total + enter
        return [torch.sigmoid(o) * cell / total, cell, total, top]
