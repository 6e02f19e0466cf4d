"""Attention to a fixed number of slots, each of which remembers keys and values by a decay of its own.

For each head, with slots of keys and values [M, K] and [M, V], log decays g [M] and alpha = e^g:

    Kt_t = Diag(alpha_t) Kt_{t-1} + (1 - alpha_t) k_t^T
    Vt_t = Diag(alpha_t) Vt_{t-1} + (1 - alpha_t) v_t^T
    o_t = Vt_t^T softmax(Kt_t q_t)

Two gated linear recurrences with a softmax between: the first has the slots for values, which decay (`twofold_linear`),
the second for keys (`chunked_linear`).

All forms take q_BTHK, k_BTHK (q comes scaled), v_BTGV with a multiple of their heads, log decays decay_BTGM in [-5, 0],
None in the place of a write strength, and state_BGMF before the first token, Vt and Kt side by side, None for zeros. They
return o_BTGV in the dtype of v and the final state. States and everything between are float32, or float64 where v is.

Source: Zhang et al. 2024 (arXiv 2409.07146), equations 5 to 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.kernels import chunked_linear, twofold_linear
from mixforge.kernels.backend import triton_form
from mixforge.kernels.chunked_linear import add_channel
from mixforge.kernels.operands import check_heads, check_shape
from mixforge.kernels.twofold_linear import twofold_linear_torch


def slot_attention_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay_BTGM: Tensor,
    strength: None = None,
    state_BGMF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after the other."""
    check_slots(q_BTHK, k_BTHK, v_BTGV, decay_BTGM, state_BGMF)
    state = first_slots(k_BTHK, v_BTGV, decay_BTGM, state_BGMF)
    outputs = []
    inputs = (x.unbind(1) for x in (q_BTHK, k_BTHK, v_BTGV, decay_BTGM))
    for q_BHK, k_BHK, v_BGV, decay_BGM in zip(*inputs, strict=True):
        o_BGV, state = slot_attention_step(q_BHK, k_BHK, v_BGV, decay_BGM, None, state)
        outputs.append(o_BGV)
    return torch.stack(outputs, 1), state


def slot_attention_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BGV: Tensor, decay_BGM: Tensor, strength: None, state_BGMF: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: (o_BGV, state_BGMF)."""
    dtype, value_dim = state_BGMF.dtype, v_BGV.shape[2]
    group = v_BGV.shape[1] // q_BHK.shape[1]
    q_BGK, k_BGK = (x.to(dtype).repeat_interleave(group, 1) for x in (q_BHK, k_BHK))
    log_BGM1 = decay_BGM.to(dtype)[..., None]
    write_BGF = torch.cat([v_BGV.to(dtype), k_BGK], -1)
    state = log_BGM1.exp() * state_BGMF - torch.expm1(log_BGM1) * write_BGF[..., None, :]
    weight_BGM = (state[..., value_dim:] @ q_BGK[..., None])[..., 0].softmax(-1)
    o_BGV = (weight_BGM[..., None, :] @ state[..., :value_dim])[..., 0, :]
    return o_BGV.to(v_BGV.dtype), state


def slot_attention_step_triton(
    q_BHK: Tensor, k_BHK: Tensor, v_BGV: Tensor, decay_BGM: Tensor, strength: None, state_BGMF: Tensor
) -> tuple[Tensor, Tensor]:
    """As `slot_attention_step`, its keys and its values each by one kernel. Where gradients are off, in place."""
    run = triton_form("chunked_linear_step", "linear_step_triton")
    group = v_BGV.shape[1] // q_BHK.shape[1]
    q, k, v, log = (x.to(state_BGMF.dtype) for x in (q_BHK, k_BHK, v_BGV, decay_BGM))
    if group > 1:
        q, k = q.repeat_interleave(group, 1), k.repeat_interleave(group, 1)
    write = -torch.expm1(log)
    values, keys = state_BGMF.tensor_split((v_BGV.shape[2],), -1)
    # What it reads is of no use: slots are read along their channels.
    _, keys_after = run(write, write, k, log, None, keys)
    weight = (keys_after @ q[..., None])[..., 0].softmax(-1)
    o_BGV, values_after = run(weight, write, v, log, None, values)
    is_in_place = keys_after is keys
    state = state_BGMF if is_in_place else torch.cat([values_after, keys_after], -1)
    return o_BGV.to(v_BGV.dtype), state


def slot_attention_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay_BTGM: Tensor,
    strength: None = None,
    state_BGMF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both recurrences in chunks, as matrix products."""
    return _twice(twofold_linear_torch, add_channel, q_BTHK, k_BTHK, v_BTGV, decay_BTGM, state_BGMF)


def slot_attention_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay_BTGM: Tensor,
    strength: None = None,
    state_BGMF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both recurrences by the kernels of `twofold_linear` and `chunked_linear`, in float32."""
    write = triton_form("chunked_linear", "chunked_linear_triton")
    return _twice(twofold_linear.form("triton"), write, q_BTHK, k_BTHK, v_BTGV, decay_BTGM, state_BGMF)


def _twice(
    score_slots: Callable[..., tuple[Tensor, Tensor]],
    mix_slots: Callable[..., tuple[Tensor, Tensor]],
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay_BTGM: Tensor,
    state_BGMF: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q . k of the slots by a recurrence that decays along values, and their values by one along keys."""
    check_slots(q_BTHK, k_BTHK, v_BTGV, decay_BTGM, state_BGMF)
    heads, value_dim = v_BTGV.shape[2:]
    state = first_slots(k_BTHK, v_BTGV, decay_BTGM, state_BGMF)
    group = heads // q_BTHK.shape[2]
    q, k = (x.to(state.dtype).repeat_interleave(group, 2) for x in (q_BTHK, k_BTHK))
    log = decay_BTGM.to(state.dtype)
    write = -torch.expm1(log)
    kept = torch.zeros_like(k)
    score, keys = score_slots(q, k, write, kept, log, state[..., value_dim:].mT)
    o, values = mix_slots(score.softmax(-1), write, v_BTGV.to(state.dtype), log, None, state[..., :value_dim])
    return o.to(v_BTGV.dtype), torch.cat([values, keys.mT], -1)


def first_slots(k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> Tensor:
    """The given state or zeros, in float32 (float64 where v is)."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is not None:
        return state.to(dtype)
    batch, _, heads, slots = decay.shape
    return v.new_zeros(batch, heads, slots, v.shape[3] + k.shape[3], dtype=dtype)


def check_slots(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> None:
    """Raise ValueError where shapes do not fit."""
    check_heads(q, k, v)
    check_shape("decay", decay, (*v.shape[:3], "slots"))
    check_shape("state", state, (len(v), v.shape[2], decay.shape[3], v.shape[3] + k.shape[3]))


def matmul_flops(length: int, *, heads: int, key_dim: int, value_dim: int, slots: int) -> int:
    """Matmul FLOPs of the torch form's forward pass over one sequence, two for each multiply-add; padding counts."""
    both = ((key_dim, slots), (slots, value_dim))
    return sum(
        chunked_linear.matmul_flops(
            length,
            key_heads=heads,
            value_heads=heads,
            key_dim=rows,
            value_dim=columns,
            rule="add",
            decay="channel",
        )
        for rows, columns in both
    )


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": slot_attention_reference,
    "torch": slot_attention_torch,
    "triton": slot_attention_triton,
}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of one backend. Raises ValueError where it is Triton's and Triton is not installed."""
    if backend == "triton":
        twofold_linear.form("triton")
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    return slot_attention_step_triton if backend == "triton" else slot_attention_step
