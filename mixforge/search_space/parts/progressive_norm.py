"""A layer norm that becomes a batch norm in the course of training: `norm=prepbn(steps)`.

    y = lambda LN(x) + (1 - lambda) RepBN(x),  RepBN(x) = BN(x) + eta x,  lambda = max(0, 1 - n / steps)

n: training passes before this one. LN and BN have weights and biases of their own; eta is one number, which begins at 1.

Source: Guo et al. 2024 (arXiv 2405.11582), and its public code for images, which begins with these weights.

Departures. BN takes the mean and variance of the batches before, in training as well, and adds those of its batch
afterwards: by those of its own batch a token would see the tokens after it, which decoding does not have. So no
gradient passes through them. The first batch, before which there is none, is normed by LN alone, as lambda is 1 there;
after it the statistics are its own, then the mean of all batches, and from the tenth on each batch has a weight of 0.1.
In evaluation lambda is what training has come to, where the public code takes RepBN alone at any time. That code also
keeps lambda at 1 for some steps before it falls, and at the end makes the norm a part of the matrices after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

MOMENTUM = 0.1


class ProgressiveNorm(nn.Module):
    """Over the last axis, of size `width`; statistics in float32 or better. `layer`: LN.

    A pass counts where it trains: in training mode and with gradients. One that is computed twice, as activation
    checkpointing does, counts twice.
    """

    passes: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, steps: int, layer: nn.Module, eps: float = 1e-5) -> None:
        super().__init__()
        self.steps = steps
        self.eps = eps
        self.layer = layer
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eta = nn.Parameter(torch.ones(()))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of any module, but that a model in half precision keeps float32 statistics: theirs would stand still."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("mean", "variance"):
            value = getattr(self, name)
            if value.dtype.itemsize < 4:
                setattr(self, name, value.float())
        return self

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype.itemsize >= 4 else x.float()
        share = (1 - self.passes.to(wide.dtype) / self.steps).clamp(min=0)
        # Copies, as the backward pass needs what the statistics were.
        mean, variance = self.mean.to(wide.dtype, copy=True), self.variance.to(wide.dtype, copy=True)
        batch = (wide - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias + self.eta * wide
        layer: Tensor = self.layer(x)
        if self.training and torch.is_grad_enabled():
            self.gather(wide.detach())
        return (share * layer + (1 - share) * batch).to(x.dtype)

    @torch.no_grad()
    def gather(self, x: Tensor) -> None:
        """The statistics and the count after one more pass."""
        self.passes += 1
        weight = (1 / self.passes.to(x.dtype)).clamp(min=MOMENTUM)
        variance, mean = torch.var_mean(x.flatten(0, -2), 0, correction=0)
        self.mean += weight * (mean - self.mean)
        self.variance += weight * (variance - self.variance)
