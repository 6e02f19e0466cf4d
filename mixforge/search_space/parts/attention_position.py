"""Positions in attention that turn queries and keys before they meet (see `rotary` for the turn itself).

    rope      angle = t theta^(-2i/K), the same for every head
    xpos      as rope, and q_t zeta_i^(t/512), k_s zeta_i^(-s/512) with zeta_i = (2i/K + 0.4) / 1.4
    lrpe      angle = t f_hi with learned frequencies, which start as those of rope
    carope    angle = sum_{s <= t} f_h(x_s)^i, i = 1 .. K/2, with f(x) = 1 / (1 + softplus(W x)) in (0, 1)

Sources: Su et al. 2021 (arXiv 2104.09864); Sun et al. 2022 (arXiv 2212.10554), algorithm 1; Qin et al. 2023 (arXiv
2307.09270), the rotations of section 3 with learned angles; Veisi et al. 2025 (arXiv 2507.23083).

Departures: heads that share a key head share the frequencies of `lrpe` and `carope`, as both ends of a score must
turn alike. Scales of `xpos` are taken relative to the last query of a pass and not to the middle of the sequence,
which is the same score: a scale never grows with the place of a key, and that of a query overflows in float32 only in
a single pass over more than 35,000 tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.rotary import angles, frequencies, turn


class Position(nn.Module):
    """Abstract."""

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What it carries from token to token."""
        return {}

    def angles(self, x_BTD: Tensor, positions_T: Tensor, state: dict[str, Tensor] | None) -> Tensor | None:
        """Angles [..., T, heads of the keys or 1, pairs] of the tokens of a pass; None where nothing turns.

        The state is brought up to date in place.
        """
        raise NotImplementedError

    def scaled(self, x_BHTK: Tensor, away_T: Tensor, sign: int) -> Tensor:
        """Queries (sign 1) or keys (sign -1) scaled by how many tokens they stand before the pass's last one."""
        return x_BHTK


class Nowhere(Position):
    """No position."""

    def angles(self, x_BTD: Tensor, positions_T: Tensor, state: dict[str, Tensor] | None) -> Tensor | None:
        return None


class Rotary(Position):
    """Pairs of the first `channels` channels turn; with `scales`, xpos."""

    def __init__(self, channels: int, theta: float, scales: bool) -> None:
        super().__init__()
        self.channels = channels
        self.theta = theta
        self.scales = scales

    def angles(self, x_BTD: Tensor, positions_T: Tensor, state: dict[str, Tensor] | None) -> Tensor | None:
        return angles(positions_T, frequencies(self.channels, self.theta, x_BTD))

    def scaled(self, x_BHTK: Tensor, away_T: Tensor, sign: int) -> Tensor:
        if not self.scales:
            return x_BHTK
        exact = torch.float64 if x_BHTK.dtype == torch.float64 else torch.float32
        pairs = self.channels // 2
        zeta = (torch.arange(pairs, device=x_BHTK.device, dtype=exact) / pairs + 0.4) / 1.4
        # Slots that are still empty count as tokens after the last one; their scale must not overflow.
        exponent = away_T.clamp(min=0).to(exact)[:, None] * (-sign / 512)
        scale = (exponent * zeta.log()).exp().to(x_BHTK.dtype)
        rest = x_BHTK[..., self.channels :]
        return torch.cat([x_BHTK[..., : self.channels] * torch.cat([scale, scale], -1), rest], -1)


class LearnedRotary(Position):
    """Frequencies are weights [key heads, pairs]."""

    def __init__(self, channels: int, heads: int, theta: float) -> None:
        super().__init__()
        start = frequencies(channels, theta, torch.zeros(()))
        self.frequency = nn.Parameter(start.repeat(heads, 1))

    def angles(self, x_BTD: Tensor, positions_T: Tensor, state: dict[str, Tensor] | None) -> Tensor | None:
        exact = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        return angles(positions_T, self.frequency.to(exact))


class ContextRotary(Position):
    """Frequencies are made of the tokens, and angles are their sums; these are kept in float64.

    A score with unit keys sees an angle's error times the scale of the query, and a float32 sum is off by more with
    every token.
    """

    def __init__(self, width: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.pairs = channels // 2
        self.frequency = Dense(width, heads, bias=False)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"angle": torch.zeros(batch, self.heads, self.pairs, device=device, dtype=torch.float64)}

    def angles(self, x_BTD: Tensor, positions_T: Tensor, state: dict[str, Tensor] | None) -> Tensor | None:
        exact = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        f_BTH1 = 1 / (1 + F.softplus(self.frequency(x_BTD).to(exact)))[..., None]
        power = torch.arange(1, self.pairs + 1, device=x_BTD.device, dtype=exact)
        angle = (f_BTH1**power).double().cumsum(1)
        if state is not None:
            angle = angle + state["angle"][:, None]
            state["angle"].copy_(angle[:, -1])
        return angle.remainder(2 * math.pi).to(exact)


def turned(x_BTHK: Tensor, angle: Tensor | None) -> Tensor:
    """[B, T, H, K] turned by the angles of its head or of its group of heads."""
    if angle is None:
        return x_BTHK
    if 1 < angle.shape[-2] < x_BTHK.shape[2]:
        angle = angle.repeat_interleave(x_BTHK.shape[2] // angle.shape[-2], -2)
    return turn(x_BTHK, angle)
