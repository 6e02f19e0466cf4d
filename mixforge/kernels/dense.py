"""y = W x + b of float32 on a CPU, by the library that is fastest on it.

torch takes products of float32 to MKL, which has no AVX-512 code for AMD's processors. oneDNN has, and comes with torch:
forward 1.5 to 2.3 times as fast, with backward 1.3 to 2.0 times (docs/benchmarks.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiply-adds, and rows, from which on oneDNN's preparations, 10 microseconds, are paid for.
LEAST = 2**21
LEAST_ROWS = 16
# Inputs and outputs from which on it is hardly ever slower than MKL for the gradient of W.
LEAST_DIM = 64

_PLAIN = (Tensor, torch.nn.Parameter)


def dense(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """As `F.linear`: [..., D] -> [..., F]."""
    # First, for a compiler would trace what follows, and guard against the sizes.
    if torch.compiler.is_compiling():
        return F.linear(x, weight_FD, bias_F)
    is_large = x.numel() * len(weight_FD) >= LEAST and x.numel() >= LEAST_ROWS * x.shape[-1]
    product = onednn_product() if is_large else None
    if product is None or not is_plain(x, weight_FD):
        return F.linear(x, weight_FD, bias_F)
    if torch.is_grad_enabled():
        y: Tensor = OneDnn.apply(x, weight_FD, bias_F)  # type: ignore[no-untyped-call]
        return y
    return product(x, weight_FD, bias_F)


@functools.cache
def onednn_product() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """oneDNN's, where it is the faster one."""
    processor = Path("/proc/cpuinfo")
    is_served_by_mkl = not processor.exists() or "AuthenticAMD" not in processor.read_text()
    if is_served_by_mkl or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    return _onednn_product()


def _onednn_product() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    operation = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        # It takes a thousand times as long for weights that lie apart.
        if not (weight_FD.is_contiguous() or weight_FD.mT.is_contiguous()):
            weight_FD = weight_FD.contiguous()
        y: Tensor = operation(x, weight_FD, bias_F, "none", [], "")
        return y

    return product


def is_plain(x: Tensor, weight_FD: Tensor) -> bool:
    """Whether both are float32 on a CPU with nothing that looks on.

    That is a tracer, a counter of FLOPs, autocast or a transform of `torch.func`.
    """
    is_float = x.dtype == weight_FD.dtype == torch.float32 and x.device.type == weight_FD.device.type == "cpu"
    is_watched = (
        torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )
    return is_float and not is_watched and type(x) in _PLAIN and type(weight_FD) in _PLAIN


class OneDnn(torch.autograd.Function):
    """`dense` by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        ctx.product = onednn_product()
        y: Tensor = ctx.product(x, weight_FD, bias_F)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_FD = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # With gradients on, this pass is to have a gradient of its own.
        product = F.linear if torch.is_grad_enabled() else ctx.product
        dx = product(dy, weight_FD.mT, None) if of_x else None
        dy_NF, x_ND = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        of_matrix = product if min(weight_FD.shape) >= LEAST_DIM else F.linear
        dweight_FD = of_matrix(dy_NF.mT, x_ND.mT, None) if of_weight else None
        return dx, dweight_FD, dy_NF.sum(0) if of_bias else None
