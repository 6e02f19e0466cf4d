"""One token of the linear family in Triton, the state in place: `chunked_linear.linear_step` has the equations."""

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
from mixforge.kernels.chunked_linear_triton import GATES, GROUP, check_limits, chunked_linear_triton, padded
from mixforge.kernels.chunked_linear_wide_triton import linear_step_wide
from mixforge.kernels.launch import check_device, generation, launch, on_device, recording

# Key channels of one program.
MOST_KEYS_NOW = 256


@triton.jit
def linear_step(
    q, k, v, log, beta, state, o,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    ROW: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one head, a block of value channels, a part of the key channels; the state, rows of ROW, in place."""
    bg, block, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    g = bg % G
    channel, value = part * KP + tl.arange(0, KP), block * BV + tl.arange(0, BV)
    in_keys, in_values = channel < K, value < V
    key = (bg // G * H + g // (G // H)) * K + channel
    q_K = tl.load(q + key, mask=in_keys, other=0.0).to(tl.float32)
    k_K = tl.load(k + key, mask=in_keys, other=0.0).to(tl.float32)
    u_V = tl.load(v + bg * V + value, mask=in_values, other=0.0).to(tl.float32)
    matrix = bg * K * ROW + channel[:, None] * ROW + value[None, :]
    in_matrix = in_keys[:, None] & in_values[None, :]
    s_KV = tl.load(state + matrix, mask=in_matrix, other=0.0)
    if GATE == 1:
        s_KV *= tl.exp(tl.load(log + g).to(tl.float32))
    if GATE == 2:
        s_KV *= tl.exp(tl.load(log + bg).to(tl.float32))
    if GATE == 3:
        s_KV *= tl.exp(tl.load(log + bg * K + channel, mask=in_keys, other=0.0).to(tl.float32))[:, None]
    if DELTA:
        u_V = tl.load(beta + bg).to(tl.float32) * (u_V - tl.sum(k_K[:, None] * s_KV, 0))
    s_KV += k_K[:, None] * u_V[None, :]
    tl.store(state + matrix, s_KV, mask=in_matrix)
    o_V = tl.sum(q_K[:, None] * s_KV, 0)
    tl.store(o + (part * tl.num_programs(0) + bg) * V + value, o_V.to(o.dtype.element_ty), mask=in_values)


def step_kernels(
    q: Tensor, k: Tensor, v: Tensor, decay_now: Tensor | None, beta: Tensor | None, state: Tensor
) -> Tensor:
    """o of one token; the state is brought up to date in place."""
    check_device(q=q, k=k, v=v, decay=decay_now, beta=beta, state=state)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    decay_now, beta = (None if x is None else x.contiguous() for x in (decay_now, beta))
    batch, key_heads, keys = q.shape
    heads, values = v.shape[1:]
    gate = "none" if decay_now is None else {1: "head", 2: "scalar", 3: "channel"}[decay_now.dim()]
    if beta is not None and keys > MOST_KEYS_NOW:
        config = choose("linear_step_wide", generation(), v.dtype, keys, values)
        o = torch.empty_like(v)
        launch(
            linear_step_wide, (batch * heads, -(-values // config.blocks["BV"])), q, k, v, decay_now, beta, state, o,
            config=config, H=key_heads, G=heads, K=keys, V=values, GATE=GATES[gate], ROW=state.stride(2),
        )  # fmt: skip
        return o
    found = choose("linear_step", generation(), v.dtype, keys, values)
    config = replace(found, blocks={"BV": min(found.blocks["BV"], padded(values))})
    channels = padded(keys) if keys <= MOST_KEYS_NOW else GROUP
    parts = -(-keys // channels)
    o = v.new_empty(parts, *v.shape, dtype=v.dtype if parts == 1 else torch.float32)
    launch(
        linear_step, (batch * heads, -(-values // config.blocks["BV"]), parts), q, k, v, decay_now, beta, state, o,
        config=config, H=key_heads, G=heads, K=keys, V=values, GATE=GATES[gate], DELTA=beta is not None,
        ROW=state.stride(2), KP=channels,
    )  # fmt: skip
    return o[0] if parts == 1 else o.sum(0).to(v.dtype)


one_step = torch.library.custom_op("mixforge::linear_step", on_device(step_kernels), mutates_args=("state",))


@one_step.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return step_kernels(*args)


def linear_step_triton(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BGV: Tensor,
    decay_now: Tensor | None,
    beta_BG: Tensor | None,
    state_BGKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `linear_step`, in one kernel, in place where gradients are off. Where some are wanted, a sequence of one token.

    Raises ValueError where a shape, dtype or device does not fit.
    """
    decay, beta = decay_now, beta_BG
    if decay is not None and decay.dim() > 1:
        decay = decay[:, None]
    beta = None if beta is None else beta[:, None]
    q, k, v = q_BHK[:, None], k_BHK[:, None], v_BGV[:, None]
    check_arguments(q, k, v, decay, beta, state_BGKV, None)
    check_limits(q, ANY)
    given = (q_BHK, k_BHK, v_BGV, decay_now, beta_BG, state_BGKV)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        o, state = chunked_linear_triton(q, k, v, decay, beta, state_BGKV)
        return o[:, 0], state
    check_rows(state_BGKV)
    state = state_BGKV.clone() if torch.is_grad_enabled() else state_BGKV
    return one_step(q_BHK, k_BHK, v_BGV, decay_now, beta_BG, state), state


def check_rows(state: Tensor) -> None:
    """Raise ValueError for a state that cannot be written in place: rows of one distance, each in one piece."""
    (_, heads, rows, _), row = state.shape, state.stride(2)
    strides = zip(state.shape, state.stride(), (heads * rows * row, rows * row, row, 1), strict=True)
    if state.dtype != torch.float32 or any(size > 1 and found != wanted for size, found, wanted in strides):
        raise ValueError(
            f"state is {state.dtype} with strides {state.stride()}; it must be float32, and contiguous or some of the "
            "columns of one that is"
        )
