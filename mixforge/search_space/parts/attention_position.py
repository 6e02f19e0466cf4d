"""Positions in attention that turn queries and keys before they meet (see `rotary`)."""

from __future__ import annotations

from torch import Tensor, nn

from mixforge.search_space.parts.rotary import angles, frequencies, turn


class Position(nn.Module):
    """No position at all. Abstract for those that turn."""

    def angles(self, x_BTD: Tensor, positions_T: Tensor, state: dict[str, Tensor] | None) -> Tensor | None:
        """Angles [..., T, heads of the keys or 1, pairs] of the tokens of a pass; None where nothing turns."""
        return None


class Rotary(Position):
    """Pairs of the first `channels` channels turn by the position times theta^(-2i / channels)."""

    def __init__(self, channels: int, theta: float) -> None:
        super().__init__()
        self.channels = channels
        self.theta = theta

    def angles(self, x_BTD: Tensor, positions_T: Tensor, state: dict[str, Tensor] | None) -> Tensor | None:
        return angles(positions_T, frequencies(self.channels, self.theta, x_BTD))


def turned(x_BTHK: Tensor, angle: Tensor | None) -> Tensor:
    """[B, T, H, K] turned by the angles of its head or of its group of heads."""
    if angle is None:
        return x_BTHK
    if 1 < angle.shape[-2] < x_BTHK.shape[2]:
        angle = angle.repeat_interleave(x_BTHK.shape[2] // angle.shape[-2], -2)
    return turn(x_BTHK, angle)
