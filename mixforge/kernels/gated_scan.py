"""The elementwise gated scan h_t = a_t h_{t-1} + b_t, with a_t = e^(log a_t) in [0, 1].

In the torch form the time is laid out as C blocks of L rows: L steps advance all blocks at once, each from zero;
one pass over the C blocks carries the state across; the rows then get what reached their block. Only products
of gates occur, never their quotient, so that gates near zero are exact. The adjoint is the same scan backwards,
dh_t = do_t + a_{t+1} dh_{t+1}, with d log a_t = a_t h_{t-1} dh_t.

Source: De et al. 2024 (arXiv 2402.19427, section 2.4) for the recurrence; Blelloch 1990 (Prefix sums and their
applications, section 1.4) for first-order recurrences in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.operands import ROUNDING, check_alike, check_axes, check_log, check_shape, states_of
from mixforge.kernels.packed import edge_tokens
from mixforge.kernels.tracing import fixed, unaliased

# Gates below are zero: e^-60 is nothing beside rounding, and smaller powers make denormal numbers, which are slow.
LOG_FLOOR = -60.0
# Values that a step should advance at once to be worth its call: short rows are laid out as several blocks.
BLOCK_VALUES = 2048


def gated_scan_reference(
    log_a_BTD: Tensor, b_BTD: Tensor, state_BD: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token after the other. Returns (h_BTD, final state_BD); a state of None is zeros.

    States are float32, or float64 where b is; h has the dtype of b. A log gate may be -inf. Of packed sequences
    (`packed`), the states are [N, D].

    Raises ValueError where a shape, dtype or device does not fit or, on a CPU, a log gate is above 0.
    """
    check_scan(log_a_BTD, b_BTD, state_BD, cu_seqlens)
    dtype = torch.float64 if b_BTD.dtype == torch.float64 else torch.float32
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        pieces = [
            gated_scan_reference(
                log_a_BTD[:, begin:end],
                b_BTD[:, begin:end],
                None if state_BD is None else state_BD[n : n + 1],
            )
            for n, (begin, end) in enumerate(pairwise(bounds))
        ]
        return torch.cat([h for h, _ in pieces], 1), torch.cat([final for _, final in pieces])
    h_BD = torch.zeros_like(b_BTD[:, 0], dtype=dtype) if state_BD is None else state_BD.to(dtype)
    steps = []
    for a_BD, b_BD in zip(log_a_BTD.to(dtype).exp().unbind(1), b_BTD.to(dtype).unbind(1), strict=True):
        h_BD = a_BD * h_BD + b_BD
        steps.append(h_BD)
    return torch.stack(steps, 1).to(b_BTD.dtype), h_BD


def gated_scan_torch(
    log_a_BTD: Tensor, b_BTD: Tensor, state_BD: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `gated_scan_reference`, in blocks."""
    check_scan(log_a_BTD, b_BTD, state_BD, cu_seqlens)
    dtype = torch.float64 if b_BTD.dtype == torch.float64 else torch.float32
    log_a, b = log_a_BTD.to(dtype), b_BTD.to(dtype)
    if cu_seqlens is None:
        state = torch.zeros_like(b[:, 0]) if state_BD is None else state_BD.to(dtype)
        h_BTD: Tensor = GatedScan.apply(log_a, b, state)  # type: ignore[no-untyped-call]
        return h_BTD.to(b_BTD.dtype), h_BTD[:, -1]
    # A sequence begins behind a gate that is shut, with what its state gives added to its first token.
    first_N, last_N, has_any_N = edge_tokens(cu_seqlens)
    state = b.new_zeros(len(first_N), b.shape[2]) if state_BD is None else state_BD.to(dtype)
    if state_BD is not None:
        given_ND = log_a[0, first_N].exp() * state
        b = b.index_add(1, first_N, torch.where(has_any_N[:, None], given_ND, 0.0)[None])
    h_BTD = GatedScan.apply(  # type: ignore[no-untyped-call]
        log_a.index_fill(1, first_N, -math.inf), b, torch.zeros_like(b[:, 0])
    )
    return h_BTD.to(b_BTD.dtype), torch.where(has_any_N[:, None], h_BTD[0, last_N], state)


def check_scan(
    log_a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    is_step: bool = False,
) -> None:
    """Raise ValueError where a shape, dtype or device does not fit or, on a CPU, a log gate is above 0."""
    check_axes("b", b, "batch, dim" if is_step else "batch, time, dim")
    check_shape("log_a", log_a, b.shape)
    check_shape("state", state, (states_of(b, cu_seqlens), b.shape[-1]), is_needed=is_step)
    check_alike(b=b, log_a=log_a, state=state)
    if not is_step:
        check_log("log_a", log_a, rounding=ROUNDING)


def gated_scan_step(log_a_BD: Tensor, b_BD: Tensor, state_BD: Tensor) -> tuple[Tensor, Tensor]:
    """One token: (h_BD in the dtype of b, state_BD). Where gradients are off, the state is updated in place.

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    check_scan(log_a_BD, b_BD, state_BD, is_step=True)
    dtype = state_BD.dtype
    state = state_BD.clone() if torch.is_grad_enabled() else state_BD
    state.mul_(log_a_BD.to(dtype).exp()).add_(b_BD.to(dtype))
    return state.to(b_BD.dtype), state


class GatedScan(torch.autograd.Function):
    """h_BTD of log_a_BTD, b_BTD and state_BD, of one dtype."""

    @staticmethod
    def forward(ctx: Any, log_a_BTD: Tensor, b_BTD: Tensor, state_BD: Tensor) -> Tensor:
        a_BTD = F.threshold(log_a_BTD, LOG_FLOOR, -math.inf).exp_()
        h_BTD = unaliased(scan_blocks(a_BTD, b_BTD, state_BD))
        ctx.save_for_backward(a_BTD, h_BTD, state_BD)
        return h_BTD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a_BTD, h_BTD, state_BD = ctx.saved_tensors
        # Backwards, a row is scaled by the gate of the row after it; after the last there is none.
        later_BTD = torch.cat([torch.zeros_like(a_BTD[:, :1]), a_BTD.flip(1)[:, :-1]], 1)
        dh_BTD = scan_blocks(later_BTD, do_BTD.flip(1), torch.zeros_like(state_BD)).flip(1)
        dlog_BTD = a_BTD * dh_BTD
        dstate_BD = dlog_BTD[:, 0].clone()
        dlog_BTD[:, 0] *= state_BD
        dlog_BTD[:, 1:] *= h_BTD[:, :-1]
        return dlog_BTD, dh_BTD, dstate_BD


def scan_blocks(a_BTD: Tensor, b_BTD: Tensor, state_BD: Tensor) -> Tensor:
    """h_BTD of the scan with gates `a_BTD`, without a gradient."""
    length = fixed(a_BTD.shape[1])
    blocks = max(1, min(length // 16, BLOCK_VALUES // state_BD.numel()))
    rows = -(-length // blocks)
    padding = (0, 0, 0, rows * blocks - length)
    shape = (b_BTD.shape[0], blocks, rows, b_BTD.shape[2])
    a = F.pad(a_BTD, padding).reshape(shape).unbind(2)
    b = F.pad(b_BTD, padding).reshape(shape).unbind(2)
    h_BCLD = b_BTD.new_empty(shape)
    h = h_BCLD.unbind(2)
    h[0].copy_(b[0])
    if blocks == 1:
        h[0].addcmul_(a[0], state_BD[:, None])
    is_traced = torch.compiler.is_compiling()
    for row in range(1, rows):
        # torch.compile refuses `out=` where the tensor is not contiguous.
        if is_traced:
            h[row].copy_(torch.addcmul(b[row], a[row], h[row - 1]))
        else:
            torch.addcmul(b[row], a[row], h[row - 1], out=h[row])
    if blocks > 1:
        reach_BCLD = torch.stack(a, 2).cumprod(2)
        carried = [state_BD]
        for block in range(blocks - 1):
            carried.append(torch.addcmul(h[-1][:, block], reach_BCLD[:, block, -1], carried[-1]))
        h_BCLD.addcmul_(reach_BCLD, torch.stack(carried, 1)[:, :, None])
    return h_BCLD.flatten(1, 2)[:, :length]


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": gated_scan_reference,
    "torch": gated_scan_torch,
}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of one backend; that of Triton is imported when it is asked for."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("gated_scan", "gated_scan_triton")
        return found
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("gated_scan", "gated_scan_step_triton")
        return found
    return gated_scan_step
