"""One token of `diagonal_ssm` in Triton, the state in place.

h <- a h + x        y = Re sum over p of c h        a = e^(rate + i frequency)
"""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.blocks import choose
from mixforge.kernels.diagonal_ssm import check_diagonal, diagonal_ssm_triton
from mixforge.kernels.gated_scan_triton import turn
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


@triton.jit
def diagonal_step(
    x, rate, frequency, c, state, y,
    dim: tl.constexpr, poles: tl.constexpr, COMPLEX: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One token of a block of channels, poles in blocks; real and imaginary planes are the last axis."""
    channel, batch = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.program_id(1).to(tl.int64)
    in_dim = channel < dim
    x_D = tl.load(x + batch * dim + channel, mask=in_dim, other=0.0).to(tl.float32)
    y_D = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, poles, BLOCK_P):
        pole = first + tl.arange(0, BLOCK_P)
        mask = in_dim[:, None] & (pole < poles)[None, :]
        place = channel[:, None] * poles + pole[None, :]
        spot = batch * dim * poles + place
        a_DP = tl.exp(tl.load(rate + place, mask=mask, other=0.0).to(tl.float32))
        if COMPLEX:
            angle_DP = tl.load(frequency + place, mask=mask, other=0.0).to(tl.float32)
            cosine_DP, sine_DP = turn(angle_DP)
            cosine_DP *= a_DP
            sine_DP *= a_DP
            h_DP = tl.load(state + 2 * spot, mask=mask, other=0.0)
            i_DP = tl.load(state + 2 * spot + 1, mask=mask, other=0.0)
            turned_DP = cosine_DP * i_DP + sine_DP * h_DP
            h_DP = cosine_DP * h_DP - sine_DP * i_DP + x_D[:, None]
            tl.store(state + 2 * spot, h_DP, mask=mask)
            tl.store(state + 2 * spot + 1, turned_DP, mask=mask)
            c_DP = tl.load(c + 2 * place, mask=mask, other=0.0).to(tl.float32)
            d_DP = tl.load(c + 2 * place + 1, mask=mask, other=0.0).to(tl.float32)
            y_D += tl.sum(c_DP * h_DP - d_DP * turned_DP, 1)
        else:
            h_DP = a_DP * tl.load(state + spot, mask=mask, other=0.0) + x_D[:, None]
            tl.store(state + spot, h_DP, mask=mask)
            y_D += tl.sum(tl.load(c + place, mask=mask, other=0.0).to(tl.float32) * h_DP, 1)
    tl.store(y + batch * dim + channel, y_D.to(y.dtype.element_ty), mask=in_dim)


def step_kernels(x: Tensor, rate: Tensor, frequency: Tensor | None, c: Tensor, state: Tensor) -> Tensor:
    """y of one token; the state is brought up to date in place."""
    batch, dim = x.shape
    poles = rate.shape[1]
    found = choose("diagonal_step", generation(), x.dtype, key=poles, value=dim)
    blocks = {**found.blocks, "BLOCK_P": min(found.blocks["BLOCK_P"], triton.next_power_of_2(poles))}
    config = replace(found, blocks=blocks)
    y = torch.empty_like(x)
    launch(
        diagonal_step, (-(-dim // blocks["BLOCK_D"]), batch), x, rate, frequency, c, state, y,
        config=config, dim=dim, poles=poles, COMPLEX=frequency is not None,
    )  # fmt: skip
    return y


one_step = torch.library.custom_op(
    "mixforge::diagonal_ssm_step", on_device(step_kernels), mutates_args=("state",)
)


@one_step.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return step_kernels(*args)


def diagonal_ssm_step_triton(
    x_BD: Tensor, rate_DP: Tensor, frequency_DP: Tensor | None, c_DPN: Tensor, state_BDPN: Tensor
) -> tuple[Tensor, Tensor]:
    """As `diagonal_ssm_step`, in one kernel, the float32 state in place.

    Where gradients are wanted, it is a sequence of one token, which has them. Raises ValueError where a shape, dtype or
    device does not fit.
    """
    check_diagonal(x_BD, rate_DP, frequency_DP, c_DPN, state_BDPN, is_step=True)
    if wants_gradient(x_BD, rate_DP, frequency_DP, c_DPN, state_BDPN):
        y_BTD, after_BDPN = diagonal_ssm_triton(x_BD[:, None], rate_DP, frequency_DP, c_DPN, state_BDPN)
        assert after_BDPN is not None
        return y_BTD[:, 0], after_BDPN
    check_runs("x", x_BD)
    check_dtypes(x=x_BD, rate=rate_DP, frequency=frequency_DP, c=c_DPN)
    check_state(state_BDPN)
    frequency = None if frequency_DP is None else frequency_DP.contiguous()
    y_BD = one_step(x_BD.contiguous(), rate_DP.contiguous(), frequency, c_DPN.contiguous(), state_BDPN)
    return y_BD, state_BDPN
