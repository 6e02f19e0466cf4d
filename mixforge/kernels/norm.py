"""Normalisations over the last axis: by the root mean square, y = w * x / sqrt(mean(x^2) + eps), and two others.

The gate stands behind the normalisation or before it, with act the SiLU or the sigmoid:

    norm_before_gate:  y = norm(x) * act(g)          otherwise:  y = norm(x * act(g))

and the layer norm of a quotient, w * layer_norm(x / t) + b, t one number for all of the axis, as mLSTM has it.

Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4; Dao and Gu 2024 (arXiv 2405.21060, section 7.1) for
the gate before the norm; Beck et al. 2024 (arXiv 2405.04517) for the quotient. On a CPU the derivatives written out
here take less than half the time of autograd's: 3.6 against 9.7 ms, forward and backward, for the first with
[16, 512, 128] on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.operands import check_alike, check_shape


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


def quotient_norm(o: Tensor, least: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """layer_norm(x / t) * w + b over the last axis, t = max(|n|, least) + 1e-6, of o = [x, n] [..., H, D + 1].

    w and b are [H, D], `least`, which gets no gradient, [..., H, 1] or a number. In the dtype of o, float32 or float64.
    """
    y: Tensor = QuotientNorm.apply(o, least, weight, bias, eps)  # type: ignore[no-untyped-call]
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
    """Raise ValueError where the shape, dtype or device of the weight does not fit."""
    if x.numel() == 0:
        raise ValueError(f"x of shape {list(x.shape)} has no values; give at least one row")
    check_shape("weight", weight, x.shape[-1:])
    check_alike(x=x, weight=weight)


def check_gated(x: Tensor, gate: Tensor, weight: Tensor, activation: str) -> None:
    """Raise ValueError where the gate or the weight does not fit."""
    check_norm(x, weight)
    check_shape("gate", gate, x.shape)
    check_alike(x=x, gate=gate)
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


class QuotientNorm(torch.autograd.Function):
    """`quotient_norm`: y = (x - mean) f, f = r / t, r = 1 / sqrt(var / t^2 + eps), with h = g w in

        dx = (h - mean(h) - y mean(h y)) f          dt = -eps r f sum(h y)

    The norm hardly sees t: autograd through the quotient leaves of dt what is left of sums that cancel.
    """

    @staticmethod
    def forward(ctx: Any, o: Tensor, least: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, n = torch.split(o, [o.shape[-1] - 1, 1], -1)
        size = n.abs()
        slope = n.sgn().mul_(size >= least)
        factor = torch.maximum(size, least).add_(1e-6).reciprocal_()
        y = x - mean_last(x)
        inverse = mean_last(y * y).mul_(factor).mul_(factor).add_(eps).rsqrt_()
        y.mul_(factor.mul_(inverse))
        ctx.save_for_backward(y, factor, inverse.mul_(slope), weight)
        ctx.eps = eps
        return torch.addcmul(bias, y, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, factor, inverse, weight = ctx.saved_tensors
        width, gradient = y.shape[-1], gradient.contiguous()
        products = gradient * y
        dweight, dbias = (z.view(-1, *weight.shape).sum(0) for z in (products, gradient))
        along = mean_last(products.mul_(weight))
        dx = torch.mul(gradient, weight, out=products)
        dx.sub_(mean_last(dx)).addcmul_(y, along, value=-1)
        do = y.new_empty(*y.shape[:-1], width + 1)
        do[..., :width] = dx.mul_(factor)
        do[..., width:] = along.mul_(inverse).mul_(factor).mul_(-ctx.eps * width)
        return do, None, dweight, dbias, None


def mean_last(x: Tensor) -> Tensor:
    """The mean over the last axis, which stays with size 1."""
    # A product takes a third of the time of a sum over a short axis.
    share = x.new_full(x.shape[-1:], 1 / x.shape[-1])
    return torch.mv(x.reshape(-1, len(share)), share).view(*x.shape[:-1], 1)


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
