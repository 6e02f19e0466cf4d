"""One token of a mixer of the linear family, from its projections to what its output projection reads, in one kernel.

For each head: queries, keys and values out of the mixed projection; feature map, unit length and scale; the log decay
and the step size from their logits; the recurrence, the state in place; skip; norm of the head; gate.

    q = scale unit(phi(q)), k = unit(phi(k))
    log D = -e^a softplus(x + b), at least -5 for a key channel;  or log sigmoid(x) / 16;  or log(1 - 2^(-5-h))
    u = beta (v - (D S)^T k), beta = most sigmoid(x)          rule delta;  u = v, or v softplus(x + b), under rule add
    S = D S + k u^T,  o = S^T q + d v
    y = norm(o) act(gate)

The equations are those of `search_space/mixers/linear.py`, with their sources. A program holds the whole state of a
head, so key and value dims are at most 128 and 256.
"""

# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixforge.kernels.blocks import choose
from mixforge.kernels.launch import check_device, check_state, generation, launch, on_device, recording
from mixforge.kernels.operands import check_axes

DECAYS = ("none", "head", "scalar", "channel")
FEATURES = ("none", "elu1", "relu")
ACTIVATIONS = ("none", "silu", "sigmoid")


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _feature(x, inside, FEATURE: tl.constexpr, UNIT: tl.constexpr):
    if FEATURE == 1:
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    if FEATURE == 2:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.where(inside, x, 0.0)
    if UNIT:
        x = x / tl.sqrt(tl.sum(x * x, 0) + 1e-6)
    return x


@triton.jit
def linear_decode(
    mixed, decay, bias, rate, beta, gate, skip, weight, state, o,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, SIGMOID: tl.constexpr,
    DELTA: tl.constexpr, MOST: tl.constexpr, FEATURE: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr,
    DT: tl.constexpr, ACTIVATION: tl.constexpr, EPS: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """One head of one sequence."""
    bg = tl.program_id(0).to(tl.int64)
    b, g = bg // G, bg % G
    channel, value = tl.arange(0, KP), tl.arange(0, VP)
    in_keys, in_values = channel < K, value < V
    start = mixed + b * (2 * H * K + G * V)
    key = g // (G // H) * K + channel
    q_K = tl.load(start + key, mask=in_keys, other=0.0).to(tl.float32)
    k_K = tl.load(start + H * K + key, mask=in_keys, other=0.0).to(tl.float32)
    v_V = tl.load(start + 2 * H * K + g * V + value, mask=in_values, other=0.0).to(tl.float32)
    q_K = _feature(q_K, in_keys, FEATURE, UNIT) * SCALE
    k_K = _feature(k_K, in_keys, FEATURE, UNIT)
    matrix = bg * K * V + channel[:, None] * V + value[None, :]
    in_matrix = in_keys[:, None] & in_values[None, :]
    s_KV = tl.load(state + matrix, mask=in_matrix, other=0.0)
    u_V = v_V
    if DECAY == 1:
        s_KV *= 1.0 - tl.exp2(-5.0 - g.to(tl.float32))
    if DECAY == 2:
        logit = tl.load(decay + bg).to(tl.float32)
        if SIGMOID:
            s_KV *= tl.exp(-_softplus(-logit) / 16)
        else:
            dt = _softplus(logit + tl.load(bias + g).to(tl.float32))
            s_KV *= tl.exp(-tl.exp(tl.load(rate + g).to(tl.float32)) * dt)
            if DT:
                u_V *= dt
    if DECAY == 3:
        logit = tl.load(decay + bg * K + channel, mask=in_keys, other=0.0).to(tl.float32)
        if SIGMOID:
            log_K = -_softplus(-logit) / 16
        else:
            logit += tl.load(bias + g * K + channel, mask=in_keys, other=0.0).to(tl.float32)
            log_K = -tl.exp(tl.load(rate + g).to(tl.float32)) * _softplus(logit)
        s_KV *= tl.exp(tl.maximum(log_K, -5.0, propagate_nan=tl.PropagateNan.ALL))[:, None]
    if DELTA:
        step = MOST / (1.0 + tl.exp(-tl.load(beta + bg).to(tl.float32)))
        u_V = step * (u_V - tl.sum(k_K[:, None] * s_KV, 0))
    s_KV += k_K[:, None] * u_V[None, :]
    tl.store(state + matrix, s_KV, mask=in_matrix)
    o_V = tl.sum(q_K[:, None] * s_KV, 0)
    if skip is not None:
        o_V += tl.load(skip + g).to(tl.float32) * v_V
    if weight is not None:
        o_V = o_V / tl.sqrt(tl.sum(o_V * o_V, 0) / V + EPS)
        o_V *= tl.load(weight + value, mask=in_values, other=0.0).to(tl.float32)
    if ACTIVATION != 0:
        gate_V = tl.load(gate + bg * V + value, mask=in_values, other=0.0).to(tl.float32)
        o_V /= 1.0 + tl.exp(-gate_V)
        if ACTIVATION == 1:
            o_V *= gate_V
    tl.store(o + bg * V + value, o_V.to(o.dtype.element_ty), mask=in_values)


def decode_kernels(
    mixed: Tensor,
    decay: Tensor | None,
    bias: Tensor | None,
    rate: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    key_heads: int,
    decay_kind: str,
    most: float,
    feature: str,
    is_unit: bool,
    scale: float,
    is_dt: bool,
    activation: str,
    eps: float,
) -> Tensor:
    """y [B, G * V] of one token; the state [B, G, K, V], float32 and contiguous, is brought up to date in place."""
    check_device(
        mixed=mixed,
        decay=decay,
        bias=bias,
        rate=rate,
        beta=beta,
        gate=gate,
        skip=skip,
        weight=weight,
        state=state,
    )
    check_axes("state", state, "batch, heads, key dim, value dim")
    check_state(state)
    batch, heads, keys, values = state.shape
    inputs = (mixed, decay, bias, rate, beta, gate, skip, weight)
    o = mixed.new_empty(batch, heads * values)
    constants: dict[str, Any] = {
        "DECAY": DECAYS.index(decay_kind), "SIGMOID": rate is None, "DELTA": beta is not None, "MOST": most,
        "FEATURE": FEATURES.index(feature), "UNIT": is_unit, "SCALE": scale, "DT": is_dt,
        "ACTIVATION": ACTIVATIONS.index(activation), "EPS": eps,
    }  # fmt: skip
    launch(
        linear_decode, (batch * heads,), *(None if x is None else x.contiguous() for x in inputs), state, o,
        config=choose("linear_decode", generation(), mixed.dtype, keys, values),
        H=key_heads, G=heads, K=keys, V=values, KP=triton.next_power_of_2(keys), VP=triton.next_power_of_2(values),
        **constants,
    )  # fmt: skip
    return o


linear_decode_triton = torch.library.custom_op(
    "mixforge::linear_decode", on_device(decode_kernels), mutates_args=("state",)
)


@linear_decode_triton.register_fake
def _(*args: Any) -> Any:
    with recording("sm_90"):
        return decode_kernels(*args)
