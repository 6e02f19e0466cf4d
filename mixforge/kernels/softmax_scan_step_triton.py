"""One token of `softmax_scan` in Triton, the carry in place.

m' = max(m, z)        u <- u e^(m - m') + e^(z - m')        w <- w e^(m - m') + e^(z - m') v        o = w / u
"""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.blocks import choose
from mixforge.kernels.launch import (
    check_dtypes,
    check_runs,
    check_state,
    generation,
    launch,
    on_device,
    recording,
)
from mixforge.kernels.operands import wants_gradient
from mixforge.kernels.softmax_scan import Carry, check_scan


@triton.jit(do_not_specialize=["rows"])
def softmax_step(
    z, v, top, weight, sums, o, rows, V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One token of a block of heads, each with its values in blocks."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < rows
    before_R = tl.load(top + row, mask=in_rows, other=0.0)
    z_R = tl.load(z + row, mask=in_rows, other=0.0).to(tl.float32)
    top_R = tl.maximum(before_R, z_R)
    old_R, new_R = tl.exp(before_R - top_R), tl.exp(z_R - top_R)
    u_R = tl.load(weight + row, mask=in_rows, other=0.0) * old_R + new_R
    tl.store(top + row, top_R, mask=in_rows)
    tl.store(weight + row, u_R, mask=in_rows)
    for first in range(0, V, BLOCK_V):
        value = first + tl.arange(0, BLOCK_V)
        mask = in_rows[:, None] & (value < V)[None, :]
        place = row[:, None] * V + value[None, :]
        v_RV = tl.load(v + place, mask=mask, other=0.0).to(tl.float32)
        w_RV = tl.load(sums + place, mask=mask, other=0.0) * old_R[:, None] + new_R[:, None] * v_RV
        tl.store(sums + place, w_RV, mask=mask)
        tl.store(o + place, (w_RV / u_R[:, None]).to(o.dtype.element_ty), mask=mask)


def step_kernels(z: Tensor, v: Tensor, top: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """o of one token; the carry is brought up to date in place."""
    o, values = torch.empty_like(v), v.shape[2]
    config = choose("softmax_step", generation(), v.dtype, key=values)
    grid = (-(-z.numel() // config.blocks["BLOCK_R"]),)
    launch(softmax_step, grid, z, v, top, weight, sums, o, z.numel(), config=config, V=values)
    return o


one_step = torch.library.custom_op(
    "mixforge::softmax_scan_step", on_device(step_kernels), mutates_args=("top", "weight", "sums")
)


@one_step.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return step_kernels(*args)


def softmax_scan_step_triton(z_BH: Tensor, v_BHV: Tensor, carry: Carry) -> Tensor:
    """As `softmax_scan_step`, in one kernel, for a carry in float32.

    Raises ValueError where a shape, dtype or device does not fit, and where gradients are wanted, as it has none.
    """
    check_scan(z_BH, v_BHV, carry, is_step=True)
    if wants_gradient(z_BH, v_BHV, *carry):
        raise ValueError(
            "z, v or the carry requires a gradient, and a step has none: run it under torch.no_grad(), or the scan over "
            "one token"
        )
    check_runs("z", z_BH)
    check_dtypes(z=z_BH, v=v_BHV)
    for kept, shape in zip(carry, (z_BH.shape, z_BH.shape, v_BHV.shape), strict=True):
        check_state(kept, shape)
    o_BHV: Tensor = one_step(z_BH.contiguous(), v_BHV.contiguous(), *carry)
    return o_BHV
