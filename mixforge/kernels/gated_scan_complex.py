"""The elementwise scan with complex gates: h_t = a_t h_{t-1} + b_t, with a_t = e^(log a_t + i phase_t), |a_t| <= 1.

Complex numbers are pairs of real planes, P = (real, imaginary): b_BTPD [B, T, 2, D], so that every dtype serves and
a projection of width 2 D gives them as a view. The adjoint is the scan backwards with conjugate gates,
dh_t = do_t + conj(a_{t+1}) dh_{t+1}, and with w_t = conj(a_t h_{t-1}) dh_t, d log a_t = Re w_t, d phase_t = Im w_t.

Source: Orvieto et al. 2023 (arXiv 2303.06349, equation 5) for gates of magnitude and phase; Katsch 2023
(arXiv 2311.01927, equation 5) for gates that depend on the input.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.gated_scan import scan_blocks
from mixforge.kernels.operands import ROUNDING, check_alike, check_axes, check_log, check_shape, states_of
from mixforge.kernels.packed import edge_tokens


def gated_scan_complex_reference(
    log_a_BTD: Tensor,
    phase_BTD: Tensor,
    b_BTPD: Tensor,
    state_BPD: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after the other. Returns (h_BTPD, final state_BPD); a state of None is zeros.

    States are float32, or float64 where b is; h has the dtype of b. A log gate may be -inf. Of packed sequences
    (`packed`), the states are [N, 2, D].

    Raises ValueError where a shape, dtype or device does not fit or, on a CPU, a log gate is above 0.
    """
    check_complex(log_a_BTD, phase_BTD, b_BTPD, state_BPD, cu_seqlens)
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        pieces = [
            gated_scan_complex_reference(
                log_a_BTD[:, begin:end],
                phase_BTD[:, begin:end],
                b_BTPD[:, begin:end],
                None if state_BPD is None else state_BPD[n : n + 1],
            )
            for n, (begin, end) in enumerate(pairwise(bounds))
        ]
        return torch.cat([h for h, _ in pieces], 1), torch.cat([final for _, final in pieces])
    dtype = torch.float64 if b_BTPD.dtype == torch.float64 else torch.float32
    magnitude, phase = log_a_BTD.to(dtype).exp(), phase_BTD.to(dtype)
    cosine, sine = (magnitude * phase.cos()).unbind(1), (magnitude * phase.sin()).unbind(1)
    state = torch.zeros_like(b_BTPD[:, 0], dtype=dtype) if state_BPD is None else state_BPD.to(dtype)
    steps = []
    for real_BD, imaginary_BD, b_BPD in zip(cosine, sine, b_BTPD.to(dtype).unbind(1), strict=True):
        x_BD, y_BD = state.unbind(1)
        turned = (real_BD * x_BD - imaginary_BD * y_BD, real_BD * y_BD + imaginary_BD * x_BD)
        state = torch.stack(turned, 1) + b_BPD
        steps.append(state)
    return torch.stack(steps, 1).to(b_BTPD.dtype), state


def gated_scan_complex_torch(
    log_a_BTD: Tensor,
    phase_BTD: Tensor,
    b_BTPD: Tensor,
    state_BPD: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `gated_scan_complex_reference`, in blocks and in torch's complex numbers."""
    check_complex(log_a_BTD, phase_BTD, b_BTPD, state_BPD, cu_seqlens)
    dtype = torch.float64 if b_BTPD.dtype == torch.float64 else torch.float32
    log_a, phase = log_a_BTD.to(dtype), phase_BTD.to(dtype)
    b = torch.complex(*b_BTPD.to(dtype).unbind(2))
    first = None if state_BPD is None else torch.complex(*state_BPD.to(dtype).unbind(1))
    if cu_seqlens is None:
        state = torch.zeros_like(b[:, 0]) if first is None else first
        h_BTD: Tensor = ComplexScan.apply(log_a, phase, b, state)  # type: ignore[no-untyped-call]
        final = h_BTD[:, -1]
    else:
        # A sequence begins behind a gate that is shut, with what its state gives added to its first token.
        first_N, last_N, has_any_N = edge_tokens(cu_seqlens)
        state = b.new_zeros(len(first_N), b.shape[2]) if first is None else first
        if first is not None:
            given_ND = torch.polar(log_a[0, first_N].exp(), phase[0, first_N]) * first
            b = b.index_add(1, first_N, torch.where(has_any_N[:, None], given_ND, 0.0)[None])
        shut = log_a.index_fill(1, first_N, -torch.inf)
        h_BTD = ComplexScan.apply(shut, phase, b, torch.zeros_like(b[:, 0]))  # type: ignore[no-untyped-call]
        final = torch.where(has_any_N[:, None], h_BTD[0, last_N], state)
    h_BTPD = torch.stack([h_BTD.real, h_BTD.imag], 2)
    return h_BTPD.to(b_BTPD.dtype), torch.stack([final.real, final.imag], 1)


def gated_scan_complex_step(
    log_a_BD: Tensor, phase_BD: Tensor, b_BPD: Tensor, state_BPD: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (h_BPD in the dtype of b, state_BPD). Where gradients are off, the state is updated in place.

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    check_complex(log_a_BD, phase_BD, b_BPD, state_BPD, is_step=True)
    dtype = state_BPD.dtype
    magnitude, phase = log_a_BD.to(dtype).exp(), phase_BD.to(dtype)
    cosine, sine = magnitude * phase.cos(), magnitude * phase.sin()
    x_BD, y_BD = state_BPD.unbind(1)
    turned = torch.stack([cosine * x_BD - sine * y_BD, cosine * y_BD + sine * x_BD], 1) + b_BPD.to(dtype)
    state = turned if torch.is_grad_enabled() else state_BPD.copy_(turned)
    return state.to(b_BPD.dtype), state


def check_complex(
    log_a: Tensor,
    phase: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    is_step: bool = False,
) -> None:
    """Raise ValueError where a shape, dtype or device does not fit or, on a CPU, a log gate is above 0."""
    check_axes(
        "b", b, "batch, real and imaginary, dim" if is_step else "batch, time, real and imaginary, dim"
    )
    *lead, _, dim = b.shape
    check_shape("b", b, (*lead, 2, dim))
    check_shape("log_a", log_a, (*lead, dim))
    check_shape("phase", phase, (*lead, dim))
    check_shape("state", state, (states_of(b, cu_seqlens), 2, dim), is_needed=is_step)
    check_alike(b=b, log_a=log_a, phase=phase, state=state)
    if not is_step:
        check_log("log_a", log_a, rounding=ROUNDING)


class ComplexScan(torch.autograd.Function):
    """h_BTD of log_a_BTD and phase_BTD, real, and b_BTD and state_BD, complex."""

    @staticmethod
    def forward(ctx: Any, log_a_BTD: Tensor, phase_BTD: Tensor, b_BTD: Tensor, state_BD: Tensor) -> Tensor:
        a_BTD = torch.polar(log_a_BTD.exp(), phase_BTD)
        h_BTD = scan_blocks(a_BTD, b_BTD, state_BD)
        ctx.save_for_backward(a_BTD, h_BTD, state_BD)
        return h_BTD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a_BTD, h_BTD, state_BD = ctx.saved_tensors
        # Backwards, a row is scaled by the gate of the row after it; after the last there is none.
        later_BTD = torch.cat([torch.zeros_like(a_BTD[:, :1]), a_BTD.flip(1)[:, :-1].conj()], 1)
        dh_BTD = scan_blocks(later_BTD, do_BTD.flip(1), torch.zeros_like(state_BD)).flip(1)
        along_BTD = torch.cat([state_BD[:, None], h_BTD[:, :-1]], 1).mul_(a_BTD).conj() * dh_BTD
        return along_BTD.real, along_BTD.imag, dh_BTD, a_BTD[:, 0].conj() * dh_BTD[:, 0]


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": gated_scan_complex_reference,
    "torch": gated_scan_complex_torch,
}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of one backend; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("gated_scan", "gated_scan_complex_triton")
        return found
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form(
            "gated_scan", "gated_scan_complex_step_triton"
        )
        return found
    return gated_scan_complex_step
