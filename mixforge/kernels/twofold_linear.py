"""Linear recurrences whose matrix state decays along both of its sides, in one operation.

For each head, with state S [K, V], log decays g [K] of its rows and h [V] of its columns:

    S = Diag(e^g_t) S Diag(e^h_t) + k_t v_t^T        o_t = q_t^T S

In a chunk of L tokens, with G and H the running sums of g and h, and G', H' their first rows:

    O_i = e^{H_i} (q_i e^{G_i})^T S0
          + e^{H_i - H'} sum over j <= i of (q_i e^{G_i - G'} . k_j e^{G' - G_j}) v_j e^{H' - H_j}
    S1 = Diag(e^{G_L}) S0 Diag(e^{H_L}) + sum over j of k_j e^{G_L - G_j} (v_j e^{H_L - H_j})^T

All forms take q_BTHK, k_BTHK, v_BTHV, log decays decay_BTHK and value_decay_BTHV in [-5, 0], and the state_BHKV
before the first token, None for zeros. They return o_BTHV in the dtype of v and the final state. States and
everything between are float32, or float64 where v is. Chunks have 16 rows, so that with log decays of at least -5 no
power passes e^75. They raise ValueError where a shape, dtype or device does not fit or, on a CPU, a decay leaves its
range.

Source: Pramanik et al. 2023 (arXiv 2310.15719) for the recurrence; Yang et al. 2023
(arXiv 2312.06635), section 4, for chunks of decays along one side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.chunked_linear import CHANNEL_CHUNK, CHANNEL_FLOOR, first_state
from mixforge.kernels.operands import check_alike, check_axes, check_log, check_shape
from mixforge.kernels.tracing import fixed


def twofold_linear_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor,
    value_decay_BTHV: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after the other."""
    check_twofold(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, value_decay_BTHV, state_BHKV)
    state = first_state(q_BTHK, v_BTHV, state_BHKV)
    inputs = (x.to(state.dtype).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, decay_BTHK, value_decay_BTHV))
    outputs = []
    for q_BHK, k_BHK, v_BHV, g_BHK, h_BHV in zip(*inputs, strict=True):
        keep = g_BHK.exp()[..., :, None] * h_BHV.exp()[..., None, :]
        state = keep * state + k_BHK[..., :, None] * v_BHV[..., None, :]
        outputs.append((q_BHK[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 1).to(v_BTHV.dtype), state


def twofold_linear_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor,
    value_decay_BTHV: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In chunks, as matrix products; only the states follow one another."""
    check_twofold(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, value_decay_BTHV, state_BHKV)
    length, heads = v_BTHV.shape[1:3]
    state = first_state(q_BTHK, v_BTHV, state_BHKV)
    inputs = (q_BTHK, k_BTHK, v_BTHV, decay_BTHK, value_decay_BTHV)
    q, k, v, g, h = (cut(x.to(state.dtype), CHANNEL_CHUNK, heads) for x in inputs)
    total_k, total_v = g.cumsum(-2), h.cumsum(-2)
    inner_k, inner_v = total_k - total_k[..., :1, :], total_v - total_v[..., :1, :]
    products = ((q * inner_k.exp()) @ (k * (-inner_k).exp()).mT).tril()
    within = inner_v.exp() * (products @ (v * (-inner_v).exp()))
    last_k, last_v = total_k[..., -1:, :], total_v[..., -1:, :]
    added = (k * (last_k - total_k).exp()).mT @ (v * (last_v - total_v).exp())
    kept = last_k.mT.exp() * last_v.exp()
    states = []
    for keep, add in zip(kept.unbind(), added.unbind(), strict=True):
        states.append(state)
        state = keep * state + add
    across = total_v.exp() * ((q * total_k.exp()) @ torch.stack(states))
    o = (within + across).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return o[:, :length].to(v_BTHV.dtype), state


def twofold_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    decay_BHK: Tensor,
    value_decay_BHV: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: (o_BHV, state_BHKV).

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    check_twofold(q_BHK, k_BHK, v_BHV, decay_BHK, value_decay_BHV, state_BHKV, is_step=True)
    dtype = state_BHKV.dtype
    keep = decay_BHK.to(dtype).exp()[..., :, None] * value_decay_BHV.to(dtype).exp()[..., None, :]
    state = keep * state_BHKV + k_BHK.to(dtype)[..., :, None] * v_BHV.to(dtype)[..., None, :]
    return (q_BHK.to(dtype)[..., None, :] @ state)[..., 0, :].to(v_BHV.dtype), state


def check_twofold(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    value_decay: Tensor,
    state: Tensor | None,
    *,
    is_step: bool = False,
) -> None:
    """Raise ValueError where a shape, dtype or device does not fit or, on a CPU, a decay leaves its range."""
    check_equal_heads(q, k, v, state, is_step=is_step)
    check_shape("decay", decay, q.shape)
    check_shape("value_decay", value_decay, v.shape)
    check_alike(q=q, k=k, v=v, decay=decay, value_decay=value_decay, state=state)
    if not is_step:
        check_log("decay", decay, CHANNEL_FLOOR)
        check_log("value_decay", value_decay, CHANNEL_FLOOR)


def check_equal_heads(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, *, is_step: bool) -> None:
    """Raise ValueError where queries, keys, values and state have no heads in common, or no dtype."""
    for name, given in (("q", q), ("k", k), ("v", v)):
        check_axes(name, given, "batch, heads, dim" if is_step else "batch, time, heads, dim")
        if given.dtype != v.dtype:
            raise ValueError(f"{name} is {given.dtype} and v is {v.dtype}; they must have one dtype")
    check_shape("k", k, q.shape)
    check_shape("v", v, (*q.shape[:-1], "dim"))
    check_shape("state", state, (q.shape[0], *q.shape[-2:], v.shape[-1]), is_needed=is_step)


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": twofold_linear_reference,
    "torch": twofold_linear_torch,
}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of one backend. Raises ValueError for triton where Triton is not installed."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("dplr", "twofold_linear_triton")
        return found
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form("dplr_step", "twofold_step_triton")
        return found
    return twofold_step


def cut(x: Tensor, size: int, heads: int) -> Tensor:
    """[B, T, H, *] in chunks [C, B, heads, size, *]: the time padded with zeros, each head repeated in place.

    A padded token neither decays nor writes.
    """
    batch, length, own, dim = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -fixed(length) % size))
    x = x.reshape(batch, -1, size, own, 1, dim).expand(-1, -1, -1, -1, heads // own, -1)
    return x.permute(1, 0, 3, 4, 2, 5).contiguous().view(-1, batch, heads, size, dim)
