"""Second-order linear attention: keys that are what a first recurrence over the keys reads.

For each head, with states S [K, K] and H [K, V] and log decay g:

    S_t = e^g_t S_{t-1} + k_t k_t^T        H_t = e^g_t H_{t-1} + (S_t q_t) v_t^T        o_t = H_t^T q_t

Without a decay this is the masked second-order attention of the source, whose states are S, C_t = sum q_j v_j^T and
G_t = sum k_i k_i^T C_{i-1}: H_t = S_t C_t - G_t, since both are the sum of k_i (k_i . q_j) v_j^T over i <= j <= t. One
state less, and two recurrences of `chunked_linear`: (q, k, k) and (q, S_t q_t, v).

All forms take the arguments of `chunked_linear` with None in the place of beta; the state_BGKF has H and S side by side.

Source: Zhang, Qin and Gu 2025 (arXiv 2510.27258), section 3 and the masked identity. Departure: with a decay, H decays
too, where the source decays S, C and G each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.kernels import chunked_linear
from mixforge.kernels.backend import triton_form
from mixforge.kernels.chunked_linear import (
    add_channel,
    add_plain,
    add_scalar,
    chunked_linear_reference,
    linear_step,
)
from mixforge.kernels.operands import check_heads, check_shape
from mixforge.kernels.tracing import unaliased


def second_order_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None = None,
    strength: None = None,
    state_BGKF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both recurrences, one token after the other."""
    return _twice(chunked_linear_reference, q_BTHK, k_BTHK, v_BTGV, decay, state_BGKF)


def second_order_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None = None,
    strength: None = None,
    state_BGKF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both recurrences in chunks, as matrix products."""
    # Not `chunked_linear_torch`, which knows all forms: an exported model would hold them.
    run = add_plain if decay is None else add_channel if decay.dim() == 4 else add_scalar
    return _twice(run, q_BTHK, k_BTHK, v_BTGV, decay, state_BGKF)


def second_order_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None = None,
    strength: None = None,
    state_BGKF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both recurrences by the kernels of `chunked_linear`, in float32: what the second reads grows with the sequence."""
    run = triton_form("chunked_linear", "chunked_linear_triton")
    return _twice(run, q_BTHK, k_BTHK, v_BTGV, decay, state_BGKF)


def _twice(
    run: Callable[..., tuple[Tensor, Tensor]],
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    state_BGKF: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_heads(q_BTHK, k_BTHK, v_BTGV)
    value_dim, group = v_BTGV.shape[3], v_BTGV.shape[2] // q_BTHK.shape[2]
    keys_and_values = q_BTHK.shape[3] + value_dim
    check_shape("state", state_BGKF, (len(v_BTGV), v_BTGV.shape[2], q_BTHK.shape[3], keys_and_values))
    dtype = torch.float64 if v_BTGV.dtype == torch.float64 else torch.float32
    q, k = (x.to(dtype).repeat_interleave(group, 2) for x in (q_BTHK, k_BTHK))
    values, keys = (None, None) if state_BGKF is None else state_BGKF.tensor_split((value_dim,), -1)
    read, keys = run(q, k, unaliased(k), decay, None, keys)
    o, values = run(q, read, v_BTGV.to(dtype), decay, None, values)
    return o.to(v_BTGV.dtype), torch.cat([values, keys], -1)


def second_order_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BGV: Tensor,
    decay_now: Tensor | None,
    strength: None,
    state_BGKF: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of both recurrences: (o_BGV, state_BGKF). Where gradients are off, the state is updated in place."""
    return _two_steps(linear_step, q_BHK, k_BHK, v_BGV, decay_now, state_BGKF)


def second_order_step_triton(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BGV: Tensor,
    decay_now: Tensor | None,
    strength: None,
    state_BGKF: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `second_order_step`, each recurrence by one kernel."""
    run = triton_form("chunked_linear_step", "linear_step_triton")
    return _two_steps(run, q_BHK, k_BHK, v_BGV, decay_now, state_BGKF)


def _two_steps(
    run: Callable[..., tuple[Tensor, Tensor]],
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BGV: Tensor,
    decay_now: Tensor | None,
    state_BGKF: Tensor,
) -> tuple[Tensor, Tensor]:
    value_dim, group = v_BGV.shape[2], v_BGV.shape[1] // q_BHK.shape[1]
    q, k, v = (x.to(state_BGKF.dtype) for x in (q_BHK, k_BHK, v_BGV))
    if group > 1:
        q, k = q.repeat_interleave(group, 1), k.repeat_interleave(group, 1)
    values, keys = state_BGKF.tensor_split((value_dim,), -1)
    read, keys_after = run(q, k, k, decay_now, None, keys)
    o_BGV, values_after = run(q, read, v, decay_now, None, values)
    is_in_place = keys_after is keys
    state = state_BGKF if is_in_place else torch.cat([values_after, keys_after], -1)
    return o_BGV.to(v_BGV.dtype), state


def matmul_flops(length: int, *, heads: int, key_dim: int, value_dim: int, decay: str) -> int:
    """Matmul FLOPs of the torch form's forward pass over one sequence, two for each multiply-add; padding counts."""
    return sum(
        chunked_linear.matmul_flops(
            length,
            key_heads=heads,
            value_heads=heads,
            key_dim=key_dim,
            value_dim=columns,
            rule="add",
            decay=decay,
        )
        for columns in (key_dim, value_dim)
    )


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": second_order_reference,
    "torch": second_order_torch,
    "triton": second_order_triton,
}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of one backend. Raises ValueError where it is Triton's and Triton is not installed."""
    if backend == "triton":
        triton_form("chunked_linear", "chunked_linear_triton")
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    return second_order_step_triton if backend == "triton" else second_order_step
