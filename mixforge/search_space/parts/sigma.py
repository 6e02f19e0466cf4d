"""Matrices divided by their spectral norm: y = gamma / sigma(W) * W x, with a learned number gamma for each matrix.

    v = W^T u / |W^T u|,  u = W v / |W v|,  sigma = u^T W v

Source: Zhai et al. 2023 (arXiv 2303.06296), section 3.1 and appendix C: one iteration of the power method in each
forward pass of training, without a gradient; sigma itself has one. gamma begins at 1.

Each of stacked matrices (experts, blocks of the gates of rglru) has its own gamma and sigma.

Departures: recurrent matrices of `rnn`, feature maps, the second matrices of low-rank pairs and filters are not divided.
The product is divided, not the matrix, which is the same number and less work; only stacked matrices are divided
themselves. Outside training u stays, and the sigma of a linear map is measured once, when the model leaves training: the
paper's code measures it in every pass.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from mixforge.kernels.dense import dense
from mixforge.search_space.parts.stacked import Stacked

# Iterations before the first pass: sigma of a fresh matrix is then right to some percent.
_FIRST = 16


class SigmaLinear(nn.Module):
    """A linear map of spectral norm gamma, in the place of another; `matrix` is what is learned."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.in_features = inner.in_features
        self.out_features = inner.out_features
        self.matrix = inner.weight
        self.bias = inner.bias
        self.gamma = nn.Parameter(torch.ones((), device=inner.weight.device, dtype=inner.weight.dtype))
        left = torch.randn(inner.out_features, device=inner.weight.device, dtype=inner.weight.dtype)
        # There is nothing to measure where there are shapes alone.
        self.register_buffer("left", left if left.is_meta else F.normalize(left, dim=0))
        self.register_buffer("sigma", torch.ones_like(left[0]))
        self.left: Tensor
        self.sigma: Tensor
        for _ in range(0 if left.is_meta else _FIRST):
            self.measure()

    def measure(self) -> Tensor:
        """One iteration; the spectral norm, with its gradient."""
        with torch.no_grad():
            right = F.normalize(self.left @ self.matrix, dim=0, eps=1e-12)
            self.left.copy_(F.normalize(self.matrix @ right, dim=0, eps=1e-12))
        # A matrix of zeros stays one.
        return (self.left.clone() @ (self.matrix @ right)).clamp_min(1e-6)

    def train(self, mode: bool = True) -> Self:
        """Leaving training measures sigma for all passes until the next training.

        Without an iteration, so that a model that is saved and read again is the same to the last digit.
        """
        if self.training and not mode and not self.left.is_meta:
            with torch.no_grad():
                self.sigma.copy_((self.left @ self.matrix).norm().clamp_min(1e-6))
        return super().train(mode)

    def scale(self) -> Tensor:
        """What the matrix is multiplied by."""
        return self.gamma / (self.measure() if self.training else self.sigma)

    @property
    def weight(self) -> Tensor:
        """The divided matrix, for modules that take products with parts of it themselves."""
        return self.matrix * self.scale()

    def forward(self, x: Tensor) -> Tensor:
        y = dense(x, self.matrix) * self.scale()
        return y if self.bias is None else y + self.bias


class SigmaStack(nn.Module):
    """Stacked matrices [N, ., .], each of spectral norm gamma."""

    def __init__(self, matrices: Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones_like(matrices[:, 0, 0]))
        left = torch.randn_like(matrices[..., 0])
        self.register_buffer("left", left if left.is_meta else F.normalize(left, dim=1))
        self.left: Tensor
        for _ in range(0 if left.is_meta else _FIRST):
            self.measure(matrices.detach())

    def measure(self, matrices: Tensor) -> Tensor:
        """As `SigmaLinear.measure`, of each matrix."""
        with torch.no_grad():
            right = F.normalize(torch.einsum("no,noi->ni", self.left, matrices), dim=1, eps=1e-12)
            self.left.copy_(F.normalize(torch.einsum("noi,ni->no", matrices, right), dim=1, eps=1e-12))
        return torch.einsum("no,noi,ni->n", self.left.clone(), matrices, right).clamp_min(1e-6)

    def forward(self, matrices: Tensor) -> Tensor:
        if self.training:
            sigma = self.measure(matrices)
        else:
            sigma = (self.left[..., None] * matrices).sum(1).norm(dim=1).clamp_min(1e-6)
        return matrices * (self.gamma / sigma)[:, None, None]


def with_sigma(stack: nn.Module) -> nn.Module:
    """The same stack with each of its matrices in this form."""
    for module in list(stack.modules()):
        if isinstance(module, Stacked):
            register_parametrization(module, "weight", SigmaStack(module.weight))
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, SigmaLinear(child))
    return stack
