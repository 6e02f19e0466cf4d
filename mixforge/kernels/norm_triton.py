"""Triton form of the root-mean-square normalisation, with and without a gate: `norm` has the equations.

A program has whole rows in registers. The backward pass forms the root mean square anew from x, so that nothing but
the inputs is kept; its programs walk over rows, each summing a weight gradient of its own, and the sums are added up
afterwards in a fixed order. With n = x / rms, u the gradient of n w, d w = sum u n and d x = (u w - n mean(u w n)) / rms.

Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
"""

# Kernels are written in the language of Triton, whose values have no Python type.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.backend import BeyondKernels
from mixforge.kernels.blocks import choose
from mixforge.kernels.launch import check_dtypes, check_runs, generation, launch, on_device
from mixforge.kernels.norm import check_gated, check_norm

# Programs of the backward pass, each of which writes one partial gradient of the weight.
PROGRAMS = 512
# Values of a row that one program can hold.
LARGEST_DIM = 16384


@triton.jit
def activate(gate, SILU: tl.constexpr):
    """act(gate) and its derivative."""
    sigmoid = tl.sigmoid(gate)
    if SILU:
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    else:
        value = sigmoid
        slope = sigmoid * (1.0 - sigmoid)
    return value, slope


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    x_ptr, gate_ptr, weight_ptr, y_ptr, eps, rows, dim: tl.constexpr, SILU: tl.constexpr,
    NORM_FIRST: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_R rows; WIDE is the power of two that holds a row."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_D = tl.arange(0, WIDE)
    mask_RD = (row_R < rows)[:, None] & (column_D < dim)[None, :]
    offsets = row_R.to(tl.int64)[:, None] * dim + column_D[None, :]
    x = tl.load(x_ptr + offsets, mask=mask_RD, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column_D, mask=column_D < dim, other=0.0).to(tl.float32)
    factor = x
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + offsets, mask=mask_RD, other=0.0).to(tl.float32)
        factor, _ = activate(gate, SILU)
        if not NORM_FIRST:
            x = x * factor
    y = x * tl.rsqrt(tl.sum(x * x, 1) / dim + eps)[:, None] * weight[None, :]
    if gate_ptr is not None and NORM_FIRST:
        y = y * factor
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask_RD)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def norm_backward(
    x_ptr, gate_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, partial_ptr, eps, rows, rows_each,
    dim: tl.constexpr, SILU: tl.constexpr, NORM_FIRST: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of `rows_each` rows, and what they give to that of the weight, in partial [programs, D]."""
    program = tl.program_id(0)
    column_D = tl.arange(0, WIDE)
    weight = tl.load(weight_ptr + column_D, mask=column_D < dim, other=0.0).to(tl.float32)
    dweight = tl.zeros([WIDE], tl.float32)
    for start in range(program * rows_each, tl.minimum((program + 1) * rows_each, rows), BLOCK_R):
        row_R = start + tl.arange(0, BLOCK_R)
        mask_RD = (row_R < rows)[:, None] & (column_D < dim)[None, :]
        offsets = row_R.to(tl.int64)[:, None] * dim + column_D[None, :]
        x = tl.load(x_ptr + offsets, mask=mask_RD, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask_RD, other=0.0).to(tl.float32)
        into, factor, slope, along = x, x, x, dy
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offsets, mask=mask_RD, other=0.0).to(tl.float32)
            factor, slope = activate(gate, SILU)
            if NORM_FIRST:
                along = dy * factor
            else:
                into = x * factor
        # Rows beyond the last are 0, and 0 / 0 where eps is.
        square = tl.where(row_R < rows, tl.sum(into * into, 1), 1.0)
        inverse = tl.rsqrt(square / dim + eps)[:, None]
        normal = into * inverse
        dweight += tl.sum(along * normal, 0)
        along = along * weight[None, :]
        dx = (along - normal * (tl.sum(along * normal, 1) / dim)[:, None]) * inverse
        if gate_ptr is not None:
            if NORM_FIRST:
                dgate = dy * normal * weight[None, :] * slope
            else:
                dgate = dx * x * slope
                dx = dx * factor
            tl.store(dgate_ptr + offsets, dgate.to(dgate_ptr.dtype.element_ty), mask=mask_RD)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask_RD)
    tl.store(partial_ptr + program.to(tl.int64) * dim + column_D, dweight, mask=column_D < dim)


def run_forward(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, silu: bool, norm_first: bool
) -> Tensor:
    y = torch.empty_like(x)
    dim = x.shape[-1]
    rows = x.numel() // dim
    config = choose("norm_forward", generation(), x.dtype, key=dim)
    grid = (-(-rows // config.blocks["BLOCK_R"]),)
    constants = _constants(dim, silu, norm_first)
    launch(norm_forward, grid, x, gate, weight, y, eps, rows, config=config, **constants)
    return y


def run_backward(
    x: Tensor, gate: Tensor | None, weight: Tensor, dy: Tensor, eps: float, silu: bool, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate, dweight = empty_backward(x, gate, weight)
    dim = x.shape[-1]
    rows = x.numel() // dim
    config = choose("norm_backward", generation(), x.dtype, key=dim)
    tiles = -(-rows // config.blocks["BLOCK_R"])
    tiles_each = -(-tiles // PROGRAMS)
    partial = x.new_empty(-(-tiles // tiles_each), dim, dtype=torch.float32)
    launch(
        norm_backward, (partial.shape[0],), x, gate, weight, dy, dx, None if gate is None else dgate, partial,
        eps, rows, tiles_each * config.blocks["BLOCK_R"], config=config, **_constants(dim, silu, norm_first),
    )  # fmt: skip
    return dx, dgate, partial.sum(0).to(dweight.dtype)


def _constants(dim: int, silu: bool, norm_first: bool) -> dict[str, Any]:
    return {"dim": dim, "SILU": silu, "NORM_FIRST": norm_first, "WIDE": triton.next_power_of_2(dim)}


def empty_backward(x: Tensor, gate: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the gate (empty where there is none) and the weight, not yet written."""
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate)
    return torch.empty_like(x), dgate, torch.empty_like(weight)


_forward = torch.library.custom_op("mixforge::rms_norm_forward", on_device(run_forward), mutates_args=())
_backward = torch.library.custom_op("mixforge::rms_norm_backward", on_device(run_backward), mutates_args=())


@_forward.register_fake
def _(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, silu: bool, norm_first: bool) -> Tensor:
    # Tensors of the meta device get this far only where launches are written down.
    if x.device.type == "meta":
        return run_forward(x, gate, weight, eps, silu, norm_first)
    return torch.empty_like(x)


@_backward.register_fake
def _(
    x: Tensor, gate: Tensor | None, weight: Tensor, dy: Tensor, eps: float, silu: bool, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.device.type == "meta":
        return run_backward(x, gate, weight, dy, eps, silu, norm_first)
    return empty_backward(x, gate, weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, weight, *ctx.settings = inputs
    ctx.save_for_backward(x, gate, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    dx, dgate, dweight = _backward(x, gate, weight, dy.contiguous(), *ctx.settings)
    return dx, None if gate is None else dgate, dweight, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """As `rms_norm_reference`, on a GPU."""
    check_norm(x, weight)
    _check_operands(x, None, weight)
    y: Tensor = _forward(x.contiguous(), None, weight.contiguous(), eps, True, True)
    return y


def rms_norm_gated_triton(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    activation: Literal["silu", "sigmoid"] = "silu",
    norm_before_gate: bool = True,
) -> Tensor:
    """As `rms_norm_gated_reference`, on a GPU."""
    check_gated(x, gate, weight, activation)
    _check_operands(x, gate, weight)
    y: Tensor = _forward(
        x.contiguous(), gate.contiguous(), weight.contiguous(), eps, activation == "silu", norm_before_gate
    )
    return y


def _check_operands(x: Tensor, gate: Tensor | None, weight: Tensor) -> None:
    check_runs("x", x)
    check_dtypes(x=x, gate=gate, weight=weight)
    if x.shape[-1] > LARGEST_DIM:
        raise BeyondKernels(
            f"x has rows of {x.shape[-1]} values; backend='triton' takes at most {LARGEST_DIM}"
        )
