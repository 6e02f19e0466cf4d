"""One token of `log_linear` in Triton, the states in place: one kernel, which moves and reads every level that is open.

A level whose bit is set in the token's number is read once and written once; the others hold nothing and are not touched,
but for the one that takes the token's own state and those of the bits that are ones at the end.
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

from mixforge.kernels.arguments import check_arguments
from mixforge.kernels.blocks import ANY, choose
from mixforge.kernels.chunked_linear_step_triton import MOST_KEYS_NOW
from mixforge.kernels.chunked_linear_triton import GATES, GROUP, check_limits, padded
from mixforge.kernels.launch import check_device, check_state, generation, launch, on_device, recording


@triton.jit(do_not_specialize=["levels"])
def log_linear_step(
    q, k, v, log, beta, state, weight, position, o, levels,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, E: tl.constexpr, GATE: tl.constexpr,
    DELTA: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one head, a block of value channels, a part of the key channels; the states in place."""
    bg, block, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    g = bg % G
    channel, value = part * KP + tl.arange(0, KP), block * BV + tl.arange(0, BV)
    in_keys, in_values = channel < K, value < V
    key = (bg // G * H + g // (G // H)) * K + channel
    q_K = tl.load(q + key, mask=in_keys, other=0.0).to(tl.float32)
    k_K = tl.load(k + key, mask=in_keys, other=0.0).to(tl.float32)
    u_V = tl.load(v + bg * V + value, mask=in_values, other=0.0).to(tl.float32)
    keep = 1.0
    if GATE == 1:
        keep = tl.exp(tl.load(log + g).to(tl.float32))
    if GATE == 2:
        keep = tl.exp(tl.load(log + bg).to(tl.float32))
    strength = 1.0
    if DELTA:
        strength = tl.load(beta + bg).to(tl.float32)
        u_V *= strength
    in_matrix = in_keys[:, None] & in_values[None, :]
    matrix = bg * levels * K * V + channel[:, None] * V + value[None, :]
    merged_KV = k_K[:, None] * u_V[None, :]
    o_V = tl.load(weight + bg * E).to(tl.float32) * tl.sum(q_K * k_K, 0) * u_V
    number = tl.load(position).to(tl.int64)
    # Whether the bits so far are ones.
    is_end = True
    for level in range(levels):
        is_set = ((number >> level) & 1) == 1
        s_KV = keep * tl.load(state + matrix, mask=in_matrix & is_set, other=0.0)
        if DELTA:
            s_KV -= k_K[:, None] * (strength * tl.sum(k_K[:, None] * s_KV, 0))[None, :]
        share = tl.load(weight + bg * E + tl.minimum(level + 1, E - 1)).to(tl.float32)
        o_V += share * tl.sum(q_K[:, None] * s_KV, 0)
        takes, gives = is_end & (is_set == 0), is_end & is_set
        merged_KV += tl.where(gives, s_KV, 0.0)
        s_KV = tl.where(takes, merged_KV, tl.where(gives, 0.0, s_KV))
        tl.store(state + matrix, s_KV, mask=in_matrix & (is_set | takes))
        is_end = gives
        matrix += K * V
    tl.store(o + (part * tl.num_programs(0) + bg) * V + value, o_V.to(o.dtype.element_ty), mask=in_values)


def step_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_now: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    weight: Tensor,
    position: Tensor,
) -> Tensor:
    """o of one token; the states are brought up to date in place."""
    check_device(q=q, k=k, v=v, decay=decay_now, beta=beta, state=state, weight=weight, position=position)
    q, k, v, weight = q.contiguous(), k.contiguous(), v.contiguous(), weight.contiguous()
    decay_now, beta = (None if x is None else x.contiguous() for x in (decay_now, beta))
    batch, key_heads, keys = q.shape
    heads, values = v.shape[1:]
    gate = "none" if decay_now is None else {1: "head", 2: "scalar"}[decay_now.dim()]
    found = choose("log_linear_step", generation(), v.dtype, keys, values)
    config = replace(found, blocks={"BV": min(found.blocks["BV"], padded(values))})
    channels = padded(keys) if keys <= MOST_KEYS_NOW else GROUP
    parts = -(-keys // channels)
    o = v.new_empty(parts, *v.shape, dtype=v.dtype if parts == 1 else torch.float32)
    launch(
        log_linear_step, (batch * heads, -(-values // config.blocks["BV"]), parts),
        q, k, v, decay_now, beta, state, weight, position, o, state.shape[2],
        config=config, H=key_heads, G=heads, K=keys, V=values, E=weight.shape[2], GATE=GATES[gate],
        DELTA=beta is not None, KP=channels,
    )  # fmt: skip
    return o[0] if parts == 1 else o.sum(0).to(v.dtype)


one_step = torch.library.custom_op(
    "mixforge::log_linear_step", on_device(step_kernels), mutates_args=("state",)
)


@one_step.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return step_kernels(*args)


def log_linear_step_triton(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BGV: Tensor,
    decay_now: Tensor | None,
    beta_BG: Tensor | None,
    state_BGNKV: Tensor,
    weight_BGE: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `log_linear.log_linear_step`, in one kernel, the float32 states in place. It has no gradient.

    Raises ValueError where a shape, dtype or device does not fit, or there are more key channels than the kernel takes.
    """
    q, k, v = q_BHK[:, None], k_BHK[:, None], v_BGV[:, None]
    decay = decay_now if decay_now is None or decay_now.dim() == 1 else decay_now[:, None]
    beta = None if beta_BG is None else beta_BG[:, None]
    check_arguments(q, k, v, decay, beta, state_BGNKV[:, :, 0], None)
    check_limits(q, ANY if beta is None else MOST_KEYS_NOW)
    check_state(state_BGNKV)
    return one_step(q_BHK, k_BHK, v_BGV, decay_now, beta_BG, state_BGNKV, weight_BGE, position), state_BGNKV
