"""Rotary position: pairs of channels turn by an angle that grows with the position.

    (x_i, x_{i+K/2}) <- (x_i cos(t f_i) - x_{i+K/2} sin(t f_i),  x_{i+K/2} cos(t f_i) + x_i sin(t f_i))
    f_i = theta^(-2i/K), or theta^(-i/(K/2-1)) where they are spread from 1 to 1/theta

Source: Su et al. 2021 (arXiv 2104.09864), section 3.2.2; for the spread frequencies Sun et al. 2023 (arXiv 2307.08621)
in their public code. Channels are paired across halves (i with i + K/2)
and not as neighbours, which is the same map after a permutation of the channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mixforge.kernels.tracing import unaliased


def rotate(x_BTHK: Tensor, positions_T: Tensor, theta: float, spread: bool = False) -> Tensor:
    """Rotate [B, T, H, K], K even, by the int64 positions [T]. Angles are taken in float32 or better."""
    return turn(x_BTHK, angles(positions_T, frequencies(x_BTHK.shape[-1], theta, x_BTHK, spread)))


def frequencies(channels: int, theta: float, like: Tensor, spread: bool = False) -> Tensor:
    """f_i [channels / 2] on the device of `like`, in float64 where that is float64, else in float32.

    With `spread` the last of them is 1/theta.
    """
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    pair = torch.arange(channels // 2, device=like.device, dtype=exact)
    steps = max(1, channels // 2 - 1) if spread else channels / 2
    return torch.exp(pair * (-math.log(theta) / steps))


def angles(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """Angles [T, 1, K / 2] from frequencies [K / 2], or [T, H, K / 2] from [H, K / 2]."""
    return positions_T.to(frequencies.dtype)[:, None, None] * frequencies


def turn(x_BTHK: Tensor, angle: Tensor) -> Tensor:
    """Turn the first channels of [B, T, H, K], twice as many as there are angles [..., T, H or 1, pairs]."""
    turned = 2 * angle.shape[-1]
    cos, sin = angle.cos().to(x_BTHK.dtype), angle.sin().to(x_BTHK.dtype)
    pairs, rest = x_BTHK.tensor_split((turned,), -1)
    y: Tensor = Turned.apply(pairs, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))  # type: ignore[no-untyped-call]
    return torch.cat([y, rest], -1) if rest.shape[-1] else y


class Turned(torch.autograd.Function):
    """x cos + swapped(x) sin, sin with a minus in its first half; whole rows take half of the time of halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, cos, sin)
        return unaliased(swapped(x).mul_(sin).addcmul_(x, cos))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, cos, sin = ctx.saved_tensors
        # Begun with the copy, which lies as x does: attention gives gradients that lie otherwise.
        dx = (swapped(gradient) * -sin).addcmul_(gradient, cos)
        if x is None:
            return dx, None, None
        return dx, (gradient * x).sum_to_size(cos.shape), (gradient * swapped(x)).sum_to_size(sin.shape)


def swapped(x: Tensor) -> Tensor:
    """The second half of the last axis before the first, as a copy."""
    left, right = x.chunk(2, -1)
    return torch.cat([right, left], -1)
