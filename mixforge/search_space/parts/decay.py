"""Decays of a matrix state, as logarithms at most 0.

    head      log(1 - 2^(-5-h)), fixed: Sun et al. 2023 (arXiv 2307.08621), equation 8
    softplus  -exp(a) softplus(W x + b): Gu and Dao 2023 (arXiv 2312.00752), algorithm 2; Kimi Team 2025
              (arXiv 2510.26692) for one a channel
    sigmoid   log sigmoid(W x + b) / 16: Yang et al. 2023 (arXiv 2312.06635), section 4.4

Each module gives the log decay and, where there is one, the step size dt behind it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.layer import split_heads


def exact(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def draw_dt_bias(count: int) -> Tensor:
    """b with softplus(b) log-uniform between 0.001 and 0.1 (Gu and Dao 2023, section 3.6)."""
    dt = torch.exp(torch.empty(count).uniform_(math.log(0.001), math.log(0.1)))
    return dt + torch.log(-torch.expm1(-dt))


def draw_rate(count: int) -> Tensor:
    """a with exp(a) uniform between 1 and 16 (Dao and Gu 2024, arXiv 2405.21060)."""
    return torch.log(torch.empty(count).uniform_(1, 16))


class HeadDecay(nn.Module):
    """log gamma_h = log(1 - 2^(-5-h)) [H], and no dt."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        head = torch.arange(self.heads, device=x_BTD.device, dtype=exact(x_BTD).dtype)
        return torch.log1p(-torch.exp2(-5 - head)), None


class SoftplusDecay(nn.Module):
    """log D_t = -exp(a) dt, dt = softplus(W x + b): (log D [B, T, H], dt [B, T, H])."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.step_size = nn.Linear(width, heads, bias=False)
        self.bias = nn.Parameter(draw_dt_bias(heads))
        self.rate = nn.Parameter(draw_rate(heads))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        dt_BTH = F.softplus(exact(self.step_size(x_BTD)) + exact(self.bias))
        return -exact(self.rate).exp() * dt_BTH, dt_BTH


class SigmoidDecay(nn.Module):
    """log D_t = log sigmoid(W x + b) / 16 [B, T, H], and no dt."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.logit = nn.Linear(width, heads)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        return F.logsigmoid(exact(self.logit(x_BTD))) / 16, None


class SoftplusChannelDecay(nn.Module):
    """log D_t = -exp(a_h) softplus(W x + b) [B, T, H, K], at least -5, W of low rank; and no dt."""

    def __init__(self, width: int, heads: int, channels: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, heads * channels, bias=False)
        self.bias = nn.Parameter(draw_dt_bias(heads * channels))
        self.rate = nn.Parameter(draw_rate(heads))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        dt_BTF = F.softplus(exact(self.up(self.down(x_BTD))) + exact(self.bias))
        log_BTHK = -exact(self.rate).exp()[:, None] * split_heads(dt_BTF, self.heads)
        # Below -5, which keeps 0.7 % a token, the chunked form would leave float32.
        return log_BTHK.clamp(min=-5.0), None


class SigmoidChannelDecay(nn.Module):
    """log D_t = log sigmoid(W x + b) / 16 [B, T, H, K], at least -5, W of low rank; and no dt."""

    def __init__(self, width: int, heads: int, channels: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, heads * channels)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        log_BTF = F.logsigmoid(exact(self.up(self.down(x_BTD)))) / 16
        return split_heads(log_BTF, self.heads).clamp(min=-5.0), None
