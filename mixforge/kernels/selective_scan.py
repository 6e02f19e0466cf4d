"""The selective scan of Mamba (S6): a state of N values for each channel d.

    h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d]
    y_t[d] = sum_n C_t[n] h_t[d, n] + skip[d] x_t[d]

All forms take x_BTD and steps dt_BTD >= 0 (after the softplus), the rates rate_DN = A <= 0, b_BTN and c_BTN, shared by
all channels, skip_D or None, and the state before the first token, state_BDN or None for zeros. They return y_BTD in
the dtype of x and the final state_BDN, float32 (float64 where x is). They raise ValueError where a shape, dtype or
device does not fit or, on a CPU, a rate is above 0.

Source: Gu and Dao 2023 (arXiv 2312.00752, algorithm 2 and section 3.3); B is discretised by dt B, as in their code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.gated_scan import GatedScan
from mixforge.kernels.operands import check_alike, check_axes, check_log, check_shape
from mixforge.kernels.tracing import fixed

# State values of one channel and token that the torch form holds at a time and operation.
SLAB_VALUES = 1 << 18


def selective_scan_reference(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    skip_D: Tensor | None = None,
    state_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after the other."""
    check_selective(x_BTD, dt_BTD, rate_DN, b_BTN, c_BTN, skip_D, state_BDN)
    dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    rate, state = rate_DN.to(dtype), first_state(x_BTD, rate_DN, state_BDN)
    outputs = []
    steps = (value.to(dtype).unbind(1) for value in (x_BTD, dt_BTD, b_BTN, c_BTN))
    for x_BD, dt_BD, b_BN, c_BN in zip(*steps, strict=True):
        write_BDN = (dt_BD * x_BD)[..., None] * b_BN[:, None]
        state = torch.exp(dt_BD[..., None] * rate) * state + write_BDN
        y_BD = (state @ c_BN[..., None])[..., 0]
        outputs.append(y_BD if skip_D is None else y_BD + skip_D.to(dtype) * x_BD)
    return torch.stack(outputs, 1).to(x_BTD.dtype), state


def selective_scan_torch(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    rate_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    skip_D: Tensor | None = None,
    state_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the elementwise scan over all D N values, some tokens at a time, with that scan's own adjoint."""
    check_selective(x_BTD, dt_BTD, rate_DN, b_BTN, c_BTN, skip_D, state_BDN)
    dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    rate, state = rate_DN.to(dtype), first_state(x_BTD, rate_DN, state_BDN)
    size = min(fixed(x_BTD.shape[1]), max(1, SLAB_VALUES // state.numel()))
    slabs = (torch.split(value.to(dtype), size, 1) for value in (x_BTD, dt_BTD, b_BTN, c_BTN))
    outputs = []
    for x_BLD, dt_BLD, b_BLN, c_BLN in zip(*slabs, strict=True):
        log_a = (dt_BLD[..., None] * rate).flatten(2)
        write = ((dt_BLD * x_BLD)[..., None] * b_BLN[:, :, None]).flatten(2)
        h: Tensor = GatedScan.apply(log_a, write, state.flatten(1))  # type: ignore[no-untyped-call]
        h_BLDN = h.reshape(*h.shape[:2], *rate.shape)
        outputs.append((h_BLDN @ c_BLN[..., None])[..., 0])
        state = h_BLDN[:, -1]
    y_BTD = torch.cat(outputs, 1)
    if skip_D is not None:
        y_BTD = y_BTD + skip_D.to(dtype) * x_BTD.to(dtype)
    return y_BTD.to(x_BTD.dtype), state.clone()


def selective_scan_step(
    x_BD: Tensor,
    dt_BD: Tensor,
    rate_DN: Tensor,
    b_BN: Tensor,
    c_BN: Tensor,
    skip_D: Tensor | None,
    state_BDN: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: (y_BD, state_BDN). Where gradients are off, the state is updated in place.

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    check_selective(x_BD, dt_BD, rate_DN, b_BN, c_BN, skip_D, state_BDN, is_step=True)
    dtype = state_BDN.dtype
    x, dt = x_BD.to(dtype), dt_BD.to(dtype)
    state = state_BDN.clone() if torch.is_grad_enabled() else state_BDN
    state.mul_(torch.exp(dt[..., None] * rate_DN.to(dtype)))
    state.addcmul_((dt * x)[..., None], b_BN.to(dtype)[:, None])
    y_BD = (state @ c_BN.to(dtype)[..., None])[..., 0]
    if skip_D is not None:
        y_BD = y_BD + skip_D.to(dtype) * x
    return y_BD.to(x_BD.dtype), state


def first_state(x_BTD: Tensor, rate_DN: Tensor, state_BDN: Tensor | None) -> Tensor:
    """The given state or zeros, in float32 (float64 where x is)."""
    dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    if state_BDN is not None:
        return state_BDN.to(dtype)
    return x_BTD.new_zeros(x_BTD.shape[0], *rate_DN.shape, dtype=dtype)


def check_selective(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    *,
    is_step: bool = False,
) -> None:
    """Raise ValueError where a shape, dtype or device does not fit or, on a CPU, a rate is above 0."""
    check_axes("x", x, "batch, dim" if is_step else "batch, time, dim")
    *lead, dim = x.shape
    check_shape("rate", rate, (dim, "states"))
    check_axes("rate", rate, "dim, states")
    states = rate.shape[1]
    check_shape("dt", dt, x.shape)
    check_shape("b", b, (*lead, states))
    check_shape("c", c, (*lead, states))
    check_shape("skip", skip, (dim,))
    check_shape("state", state, (lead[0], dim, states), is_needed=is_step)
    check_alike(x=x, dt=dt, rate=rate, b=b, c=c, skip=skip, state=state)
    if not is_step:
        check_log("rate", rate)


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": selective_scan_reference,
    "torch": selective_scan_torch,
}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of one backend; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("selective_scan", "selective_scan_triton")
        return found
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form(
            "selective_scan", "selective_scan_step_triton"
        )
        return found
    return selective_scan_step
