"""Cells of linear recurrences h_t = a_t h_{t-1} + b_t, element by element: what makes a_t and b_t of the input.

A cell reads u_BTD and the positions of its tokens, and gives (log |a| [B, T, E], the phase of a [B, T, E] or None, b), b
being [B, T, E], or [B, T, 2, E] where there is a phase. They are computed in float32 or better. Equations and sources:
see `mixers.rec`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.stacked import Stacked

Gated = tuple[Tensor, Tensor | None, Tensor]


class BlockGate(Stacked):
    """sigmoid(W x + b), W block diagonal: [B, T, H*K] -> [B, T, H*K], in float32 or better."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(heads, head_dim, head_dim).uniform_(-1, 1) / math.sqrt(head_dim)
        )
        self.bias = nn.Parameter(torch.zeros(heads * head_dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, length, _ = x_BTD.shape
        weight_HKF = self.weight
        heads, head_dim, _ = weight_HKF.shape
        x_HMK = x_BTD.reshape(batch * length, heads, head_dim).transpose(0, 1)
        gate_BTD = torch.bmm(x_HMK, weight_HKF).transpose(0, 1).reshape(x_BTD.shape) + self.bias
        return torch.sigmoid(exact(gate_BTD))


class RglruCell(nn.Module):
    """log a = -8 softplus(rate) r, b = sqrt(1 - a^2) i u; it is as wide as u."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.recurrence_gate = BlockGate(heads, head_dim)
        self.input_gate = BlockGate(heads, head_dim)
        # softplus(rate) = -log(a) / 8, with a between 0.9 and 0.999 where the recurrence gate is 1.
        decay = torch.empty(heads * head_dim).uniform_(0.9, 0.999)
        self.rate = nn.Parameter(torch.log(torch.expm1(-torch.log(decay) / 8)))

    def forward(self, u_BTD: Tensor, positions_T: Tensor) -> Gated:
        recurrence_BTD = self.recurrence_gate(u_BTD)
        log_a_BTD = -8 * F.softplus(self.rate.to(recurrence_BTD.dtype)) * recurrence_BTD
        # 1 - a^2 without cancellation. The small term bounds the slope of the root where the gate is shut.
        scale_BTD = torch.sqrt(1e-12 - torch.expm1(2 * log_a_BTD))
        # Nothing has decayed before the first token.
        scale_BTD = torch.where((positions_T == 0)[:, None], torch.ones_like(scale_BTD), scale_BTD)
        return log_a_BTD, None, scale_BTD * self.input_gate(u_BTD) * u_BTD


class HgrnCell(nn.Module):
    """|a| = floor + (1 - floor) sigmoid(f), b = (1 - |a|) silu(c), rotated by a learned angle for each channel."""

    def __init__(self, width: int, channels: int, floor: float, is_complex: bool) -> None:
        super().__init__()
        self.floor = floor
        self.channels = channels
        self.gates = Dense(width, channels * (3 if is_complex else 2))
        # The angles of rotary position.
        exponent = -2 * torch.arange(channels) / channels
        self.angle = nn.Parameter(10000.0**exponent) if is_complex else None

    def forward(self, u_BTD: Tensor, positions_T: Tensor) -> Gated:
        gates = exact(self.gates(u_BTD))
        logit, content = gates[..., : self.channels], F.silu(gates[..., self.channels :])
        if self.floor == 0:
            log_a = F.logsigmoid(logit)
        else:
            log_a = torch.log(self.floor + (1 - self.floor) * torch.sigmoid(logit))
        written = (1 - self.floor) * torch.sigmoid(-logit)
        if self.angle is None:
            return log_a, None, written * content
        content_BTPE = torch.unflatten(content, -1, (2, self.channels))
        return log_a, exact(self.angle) + torch.zeros_like(log_a), written[..., None, :] * content_BTPE


class LruCell(nn.Module):
    """a = exp(-exp(nu) + i exp(theta)) for each channel, b = exp(gamma) B u, B complex."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        # |a| so that the numbers are uniform on the ring between 0.9 and 0.999; gamma so that |h| is that of b.
        square = torch.empty(channels).uniform_(0.9**2, 0.999**2)
        self.nu = nn.Parameter(torch.log(-0.5 * torch.log(square)))
        self.theta = nn.Parameter(torch.log(2 * math.pi * torch.rand(channels)))
        self.gamma = nn.Parameter(0.5 * torch.log1p(-square))
        self.gates = Dense(width, 2 * channels, bias=False)
        nn.init.normal_(self.gates.weight, std=(2 * width) ** -0.5)

    def forward(self, u_BTD: Tensor, positions_T: Tensor) -> Gated:
        b_BTF = exact(self.gates(u_BTD))
        b_BTPE = exact(self.gamma).exp() * torch.unflatten(b_BTF, -1, (2, self.channels))
        shape = b_BTPE[..., 0, :]
        return -exact(self.nu).exp().expand_as(shape), exact(self.theta).exp().expand_as(shape), b_BTPE


class QrnnCell(nn.Module):
    """a = sigmoid(f), b = (1 - a) tanh(z), f and z products with the last tokens."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.gates = Dense(width, 2 * channels, bias=False)

    def forward(self, u_BTD: Tensor, positions_T: Tensor) -> Gated:
        forget, content = exact(self.gates(u_BTD)).chunk(2, -1)
        return F.logsigmoid(forget), None, torch.sigmoid(-forget) * torch.tanh(content)


class MinGruCell(nn.Module):
    """a = 1 - z, b = z c, z = sigmoid of a product and c another product."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.gates = Dense(width, 2 * channels)

    def forward(self, u_BTD: Tensor, positions_T: Tensor) -> Gated:
        update, content = exact(self.gates(u_BTD)).chunk(2, -1)
        return F.logsigmoid(-update), None, torch.sigmoid(update) * content


class MinLstmCell(nn.Module):
    """a = f / (f + i), b = c i / (f + i), f and i sigmoids of products and c another product."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.gates = Dense(width, 3 * channels)

    def forward(self, u_BTD: Tensor, positions_T: Tensor) -> Gated:
        forget, enter, content = exact(self.gates(u_BTD)).chunk(3, -1)
        log_f, log_i = F.logsigmoid(forget), F.logsigmoid(enter)
        total = torch.logaddexp(log_f, log_i)
        return log_f - total, None, torch.exp(log_i - total) * content
