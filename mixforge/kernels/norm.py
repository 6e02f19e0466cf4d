"""Root-mean-square normalisation y = w * x / sqrt(mean(x^2) + eps) over the last axis, and the same with a gate.

The gate stands behind the normalisation or before it, with act the SiLU or the sigmoid:

    norm_before_gate:  y = norm(x) * act(g)          otherwise:  y = norm(x * act(g))

Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4; Dao and Gu 2024 (arXiv 2405.21060, section 7.1) for
the gate before the norm. On a CPU the derivative written out here takes less than half the time of autograd's: 3.6
against 9.7 ms, forward and backward, for [16, 512, 128] on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.backend import triton_form


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """By the equation, in float32 or better; the result has the dtype of x [..., D]. `weight` is [D]."""
    check_norm(x, weight)
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return y.to(x.dtype)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """With the derivative written out; computed in float32 or better."""
    check_norm(x, weight)
    wide = x if x.dtype == torch.float64 else x.float()
    y: Tensor = RootMeanSquare.apply(wide, weight.to(wide.dtype), eps)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


def unit_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last axis [..., D], as the published models of the delta rule have it."""
    y: Tensor = UnitNorm.apply(x, eps)  # type: ignore[no-untyped-call]
    return y


def rms_norm_gated_reference(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    activation: Literal["silu", "sigmoid"] = "silu",
    norm_before_gate: bool = True,
) -> Tensor:
    """By the equations, in float32 or better; the result has the dtype of x. `gate` has the shape of x."""
    check_gated(x, gate, weight, activation)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = gate.to(dtype)
    factor = torch.sigmoid(wide) * (wide if activation == "silu" else 1)
    if norm_before_gate:
        return (rms_norm_reference(x.to(dtype), weight, eps) * factor).to(x.dtype)
    return rms_norm_reference(x.to(dtype) * factor, weight, eps).to(x.dtype)


def rms_norm_gated_torch(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    activation: Literal["silu", "sigmoid"] = "silu",
    norm_before_gate: bool = True,
) -> Tensor:
    """With the derivative of the norm written out; computed in float32 or better."""
    check_gated(x, gate, weight, activation)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = F.silu(gate.to(dtype)) if activation == "silu" else torch.sigmoid(gate.to(dtype))
    if norm_before_gate:
        return (rms_norm_torch(x.to(dtype), weight, eps) * factor).to(x.dtype)
    return rms_norm_torch(x.to(dtype) * factor, weight, eps).to(x.dtype)


def check_norm(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError where the weight does not fit."""
    if x.numel() == 0:
        raise ValueError(f"x of shape {list(x.shape)} has no values; give at least one row")
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be of shape {list(x.shape[-1:])}, the last axis of x, got {list(weight.shape)}"
        )


def check_gated(x: Tensor, gate: Tensor, weight: Tensor, activation: str) -> None:
    """Raise ValueError where the gate or the weight does not fit."""
    check_norm(x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gate must be of the shape of x, {list(x.shape)}, got {list(gate.shape)}")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"activation must be silu or sigmoid, got {activation!r}")


class RootMeanSquare(torch.autograd.Function):
    """The operation, with dx = (g w - n mean(g w n)) / rms, n = x / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div(width).add(eps).rsqrt()
        normal: Tensor = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, inverse, weight = ctx.saved_tensors
        products = (gradient * normal).reshape(-1, len(weight))
        # In place, for memory that is touched for the first time takes longer than the arithmetic.
        along = torch.mv(products, weight).div_(-len(weight)).view(inverse.shape)
        return (gradient * weight).addcmul_(normal, along).mul_(inverse), products.sum(0), None


class UnitNorm(torch.autograd.Function):
    """`unit_norm`, with dx = (g - y (g . y)) r, r = 1 / sqrt(|x|^2 + eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vecdot(x, x).add_(eps).rsqrt_().unsqueeze(-1)
        y: Tensor = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(gradient, y).neg_().unsqueeze(-1)
        return torch.addcmul(gradient, y, along).mul_(inverse), None


FORMS: dict[str, Callable[..., Tensor]] = {"reference": rms_norm_reference, "torch": rms_norm_torch}
GATED_FORMS: dict[str, Callable[..., Tensor]] = {
    "reference": rms_norm_gated_reference,
    "torch": rms_norm_gated_torch,
}


def form(backend: str) -> Callable[..., Tensor]:
    """The form of one backend without a gate; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[..., Tensor] = triton_form("norm", "rms_norm_triton")
        return found
    return FORMS[backend]


def gated_form(backend: str) -> Callable[..., Tensor]:
    """The form of one backend with a gate; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[..., Tensor] = triton_form("norm", "rms_norm_gated_triton")
        return found
    return GATED_FORMS[backend]
