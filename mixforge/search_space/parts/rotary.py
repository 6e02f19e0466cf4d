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
    half = x_BTHK.shape[-1] // 2
    exact = torch.float64 if x_BTHK.dtype == torch.float64 else torch.float32
    pair = torch.arange(half, device=x_BTHK.device, dtype=exact)
    angle_TK = positions_T.to(exact)[:, None] * torch.exp(pair * (-math.log(theta) / half))
    cos_THK = angle_TK.cos().to(x_BTHK.dtype)[:, None]
    sin_THK = angle_TK.sin().to(x_BTHK.dtype)[:, None]
    left, right = x_BTHK.chunk(2, -1)
    return torch.cat([left * cos_THK - right * sin_THK, right * cos_THK + left * sin_THK], -1)
