"""One token of `dplr` and of `twofold_linear` in Triton, the state in place.

    S <- (Diag(e^g) - b a^T) S Diag(e^h) + k v^T        o = q^T S

One kernel, in which removal, g and h may each be left out: it reads and writes the state once.
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
from mixforge.kernels.chunked_linear_triton import check_limits, padded
from mixforge.kernels.dplr import check_dplr
from mixforge.kernels.dplr_triton import dplr_triton, twofold_linear_triton
from mixforge.kernels.launch import check_runs, check_state, generation, launch, on_device, recording
from mixforge.kernels.operands import wants_gradient
from mixforge.kernels.twofold_linear import check_twofold


@triton.jit
def dplr_step(
    q, k, v, removal, log, value_log, state, o,
    K: tl.constexpr, V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, REMOVE: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one head, a block of value channels; the state in place."""
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, value = tl.arange(0, KP), block * BV + tl.arange(0, BV)
    in_keys, in_values = channel < K, value < V
    key, spot = bh * K + channel, bh * V + value
    matrix = bh * K * V + channel[:, None] * V + value[None, :]
    in_matrix = in_keys[:, None] & in_values[None, :]
    s_KV = tl.load(state + matrix, mask=in_matrix, other=0.0)
    if VALUE:
        s_KV *= tl.exp(tl.load(value_log + spot, mask=in_values, other=0.0).to(tl.float32))[None, :]
    kept_KV = s_KV
    if KEY:
        kept_KV = s_KV * tl.exp(tl.load(log + key, mask=in_keys, other=0.0).to(tl.float32))[:, None]
    if REMOVE:
        a_K = tl.load(removal + bh * K + key, mask=in_keys, other=0.0).to(tl.float32)
        b_K = tl.load(removal + bh * K + key + K, mask=in_keys, other=0.0).to(tl.float32)
        kept_KV -= b_K[:, None] * tl.sum(a_K[:, None] * s_KV, 0)[None, :]
    k_K = tl.load(k + key, mask=in_keys, other=0.0).to(tl.float32)
    v_V = tl.load(v + spot, mask=in_values, other=0.0).to(tl.float32)
    s_KV = kept_KV + k_K[:, None] * v_V[None, :]
    tl.store(state + matrix, s_KV, mask=in_matrix)
    q_K = tl.load(q + key, mask=in_keys, other=0.0).to(tl.float32)
    o_V = tl.sum(q_K[:, None] * s_KV, 0)
    tl.store(o + spot, o_V.to(o.dtype.element_ty), mask=in_values)


def step_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    removal: Tensor | None,
    state: Tensor,
) -> Tensor:
    """o of one token; the state, which must be contiguous, is brought up to date in place."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    decay, value_decay, removal = (
        None if x is None else x.contiguous() for x in (decay, value_decay, removal)
    )
    batch, heads, keys = q.shape
    values = v.shape[2]
    found = choose("dplr_step", generation(), v.dtype, keys, values)
    config = replace(found, blocks={"BV": min(found.blocks["BV"], padded(values))})
    o = torch.empty_like(v)
    launch(
        dplr_step, (batch * heads, -(-values // config.blocks["BV"])), q, k, v, removal, decay, value_decay, state, o,
        config=config, K=keys, V=values, KEY=decay is not None, VALUE=value_decay is not None,
        REMOVE=removal is not None, KP=padded(keys),
    )  # fmt: skip
    return o


one_step = torch.library.custom_op("mixforge::dplr_step", on_device(step_kernels), mutates_args=("state",))


@one_step.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return step_kernels(*args)


def dplr_step_triton(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    decay_BHK: Tensor | None,
    removal_BHRK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `dplr.dplr_step`, in one kernel. Where gradients are wanted, a sequence of one token, which has them.

    Raises ValueError where a shape, dtype or device does not fit.
    """
    check_dplr(q_BHK, k_BHK, v_BHV, decay_BHK, removal_BHRK, state_BHKV, is_step=True)
    if wants_gradient(q_BHK, k_BHK, v_BHV, decay_BHK, removal_BHRK, state_BHKV):
        q, k, v, removal = (x[:, None] for x in (q_BHK, k_BHK, v_BHV, removal_BHRK))
        decay = None if decay_BHK is None else decay_BHK[:, None]
        o, state = dplr_triton(q, k, v, decay, removal, state_BHKV)
        return o[:, 0], state
    check_token(q_BHK)
    check_state(state_BHKV)
    return one_step(q_BHK, k_BHK, v_BHV, decay_BHK, None, removal_BHRK, state_BHKV), state_BHKV


def twofold_step_triton(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    decay_BHK: Tensor,
    value_decay_BHV: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `twofold_linear.twofold_step`, in one kernel. Where gradients are wanted, a sequence of one token, which has
    them.

    Raises ValueError where a shape, dtype or device does not fit.
    """
    given = (q_BHK, k_BHK, v_BHV, decay_BHK, value_decay_BHV)
    check_twofold(*given, state_BHKV, is_step=True)
    if wants_gradient(*given, state_BHKV):
        q, k, v, decay, value_decay = (x[:, None] for x in given)
        o, state = twofold_linear_triton(q, k, v, decay, value_decay, state_BHKV)
        return o[:, 0], state
    check_token(q_BHK)
    check_state(state_BHKV)
    return one_step(*given, None, state_BHKV), state_BHKV


def check_token(q_BHK: Tensor) -> None:
    """Raise ValueError for a device, a dtype or a dim that the kernel does not take."""
    check_runs("q", q_BHK)
    check_limits(q_BHK[:, None])
