"""Rotary position: pairs of channels turn by an angle that grows with the position.

    (x_i, x_{i+K/2}) <- (x_i cos(t f_i) - x_{i+K/2} sin(t f_i),  x_{i+K/2} cos(t f_i) + x_i sin(t f_i))
    f_i = theta^(-2i/K)

Source: Su et al. 2021 (arXiv 2104.09864), section 3.2.2. Channels are paired across halves (i with i + K/2)
and not as neighbours, which is the same map after a permutation of the channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotate(x_BTHK: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """Rotate [B, T, H, K], K even, by the int64 positions [T]. Angles are taken in float32 or better."""
    return turn(x_BTHK, angles(positions_T, frequencies(x_BTHK.shape[-1], theta, x_BTHK)))


def frequencies(channels: int, theta: float, like: Tensor) -> Tensor:
    """f_i [channels / 2] on the device of `like`, in float64 where that is float64, else in float32."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    pair = torch.arange(channels // 2, device=like.device, dtype=exact)
    return torch.exp(pair * (-2 * math.log(theta) / channels))


def angles(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """Angles [T, 1, K / 2] from frequencies [K / 2], or [T, H, K / 2] from [H, K / 2]."""
    return positions_T.to(frequencies.dtype)[:, None, None] * frequencies


def turn(x_BTHK: Tensor, angle: Tensor) -> Tensor:
    """Turn the first channels of [B, T, H, K], twice as many as there are angles [..., T, H or 1, pairs]."""
    turned = 2 * angle.shape[-1]
    cos, sin = angle.cos().to(x_BTHK.dtype), angle.sin().to(x_BTHK.dtype)
    left, right = x_BTHK[..., :turned].chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, x_BTHK[..., turned:]], -1)
