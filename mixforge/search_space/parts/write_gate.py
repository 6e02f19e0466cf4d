"""What is written: the strength of the delta rule, gates of the values, and values that layers share.

WriteStrength   beta_t = most * sigmoid(W x): Yang et al. 2024 (arXiv 2406.06484)
SigmoidGate     v <- sigmoid(W x + b) v, one number for each head
ExpGate         v <- e^{i_t} v, i_t = W x + b: Beck et al. 2024 (arXiv 2405.04517)
ValueGate       v <- sigmoid(W_2 W_1 x + b) v, for each channel: He et al. 2024 (arXiv 2410.06577)
LengthGate      v <- v / t^sigmoid(m_h): Mongaras et al. 2024 (arXiv 2409.18747), as in its public code
ValueBlend      v <- v + sigmoid(W_2 W_1 x + b) (v' - v), v' of a layer below: Peng et al. 2025 (arXiv 2503.14456),
                Zhou et al. 2024 (arXiv 2410.17897)

Logits that are given stand for W x, or W x + b.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.decay import capped, exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import split_heads

BLEND_RANK = 32


class WriteStrength(nn.Module):
    """beta_t = most * sigmoid(W x) [B, T, H]."""

    def __init__(self, width: int, heads: int, most: int) -> None:
        super().__init__()
        self.most = most
        self.logit = Dense(width, heads, bias=False)

    def forward(self, x_BTD: Tensor, logit_BTH: Tensor | None = None) -> Tensor:
        return self.most * torch.sigmoid(exact(self.logit(x_BTD) if logit_BTH is None else logit_BTH))


class SigmoidGate(nn.Module):
    """sigmoid(W x + b) [B, T, H]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.logit = Dense(width, heads)

    def forward(self, x_BTD: Tensor, logit_BTH: Tensor | None = None) -> Tensor:
        return torch.sigmoid(exact(self.logit(x_BTD) if logit_BTH is None else logit_BTH))


class ExpGate(nn.Module):
    """The gate e^{i_t} and the log decay g_t of a state that is kept as e^{-m_t} S_t, so that neither passes 1.

        m_t = max(g_t + m_{t-1}, i_t)       gate e^{i_t - m_t}       log decay g_t + m_{t-1} - m_t

    The state is m [B, H], 0 before the first token. No output depends on m, so it passes no gradient.
    """

    def __init__(self, width: int, heads: int, cap: float | None = None) -> None:
        super().__init__()
        self.cap = cap
        self.logit = Dense(width, heads)

    def forward(
        self, x_BTD: Tensor, log: Tensor | None, before_BH: Tensor | None, logit_BTH: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(gate, log decay, m), each [B, T, H]."""
        i_BTH = capped(exact(self.logit(x_BTD) if logit_BTH is None else logit_BTH), self.cap)
        log_BTH = torch.zeros_like(i_BTH) if log is None else log.expand_as(i_BTH)
        with torch.no_grad():
            # m_t - G_t is the largest of m_0 and i_s - G_s so far, G the sum of the log decays.
            total = log_BTH.double().cumsum(1)
            first = torch.zeros_like(total[:, 0]) if before_BH is None else before_BH.double()
            m = total + torch.maximum((i_BTH - total).cummax(1).values, first[:, None])
            m_BTH = m.to(i_BTH.dtype)
            before = torch.cat([first[:, None].to(i_BTH.dtype), m_BTH[:, :-1]], 1)
        kept_BTH = log_BTH + before - m_BTH
        # Rounding alone makes it larger than 0. A clamp would stop the gradient of every gate that keeps all.
        kept_BTH = kept_BTH - kept_BTH.detach().clamp(min=0)
        return (i_BTH - m_BTH).exp(), kept_BTH, m_BTH


class ValueGate(nn.Module):
    """sigmoid(W_2 W_1 x + b) [B, T, H, V]."""

    def __init__(self, width: int, heads: int, value_dim: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.down = Dense(width, rank, bias=False)
        self.up = Dense(rank, heads * value_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return split_heads(torch.sigmoid(self.up(self.down(x_BTD))), self.heads)


class LengthGate(nn.Module):
    """t^(-sigmoid(m_h)) [T, H], t from 1."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.full((heads,), 0.5))

    def forward(self, positions_T: Tensor) -> Tensor:
        power_H = torch.sigmoid(exact(self.power))
        return (-(positions_T + 1).to(power_H.dtype).log()[:, None] * power_H).exp()


class ValueBlend(nn.Module):
    """v + sigmoid(W_2 W_1 x + b) (v' - v) [B, T, H, V]."""

    def __init__(self, width: int, heads: int, value_dim: int) -> None:
        super().__init__()
        self.gate = ValueGate(width, heads, value_dim, BLEND_RANK)

    def forward(self, x_BTD: Tensor, v_BTHV: Tensor, first_BTHV: Tensor) -> Tensor:
        share_BTHV: Tensor = self.gate(x_BTD)
        return v_BTHV + share_BTHV * (first_BTHV - v_BTHV)
