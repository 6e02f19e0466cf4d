"""chunked_linear against fla-core's plain recurrences: outputs, final state and every gradient.

fla multiplies queries by K^-0.5 and we multiply them by nothing, so it gets its queries times K^0.5, or a scale of 1.
It computes in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from tolerance import assert_close
from torch import Tensor

from mixforge.kernels import chunked_linear

# Both sides round in float32, each in its own order.
RATIO = 1e-5
BATCH, HEADS, KEYS, VALUES = 3, 2, 24, 20
LENGTHS = (1, 70) if os.environ.get("TRITON_INTERPRET") else (1, 13, 70)

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]
Result = tuple[Tensor, Tensor | None]


def linear_attention(q, k, v, decay, beta, state) -> Result:
    return naive_recurrent_linear_attn(q, k, v, scale=1.0, initial_state=state, output_final_state=True)


def retention(q, k, v, decay, beta, state) -> Result:
    """It has no state, and the decays of the paper, which `inputs` gives."""
    o = naive_retention(q.transpose(1, 2) * KEYS**0.5, k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2), None


def simple_gla(q, k, v, decay, beta, state) -> Result:
    return naive_recurrent_simple_gla(q, k, v, decay, scale=1.0, initial_state=state)


def gla(q, k, v, decay, beta, state) -> Result:
    return naive_recurrent_gla(q * KEYS**0.5, k, v, decay, state, output_final_state=True)


def delta_rule(q, k, v, decay, beta, state) -> Result:
    q, k, v, beta = (x.transpose(1, 2) for x in (q * KEYS**0.5, k, v, beta))
    o, final = delta_rule_recurrence(q, k, v, beta, state)
    return o.transpose(1, 2), final


def gated_delta_rule(q, k, v, decay, beta, state) -> Result:
    return naive_recurrent_gated_delta_rule(q, k, v, beta, decay, 1.0, state, output_final_state=True)


def kda(q, k, v, decay, beta, state) -> Result:
    return naive_recurrent_kda(q, k, v, decay, beta, 1.0, state, output_final_state=True)


ORACLES: dict[str, tuple[Callable[..., Result], str, str]] = {
    "linear_attn": (linear_attention, "none", "add"),
    "retention": (retention, "head", "add"),
    "simple_gla": (simple_gla, "scalar", "add"),
    "gla": (gla, "channel", "add"),
    "delta_rule": (delta_rule, "none", "delta"),
    "gated_delta_rule": (gated_delta_rule, "scalar", "delta"),
    "kda": (kda, "channel", "delta"),
}


def form(name: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], torch.dtype]:
    """A form of the operation and the dtype that it is compared in."""
    if name == "triton":
        from mixforge.kernels.chunked_linear_triton import chunked_linear_triton

        return chunked_linear_triton, torch.float32
    kind, _, dtype = name.partition(" ")
    return chunked_linear.FORMS[kind], getattr(torch, dtype)


FORMS = ("triton",) if os.environ.get("TRITON_INTERPRET") else (
    "reference float64", "torch float64", "torch float32",
)  # fmt: skip


def inputs(decay: str, rule: str, length: int, oracle: str) -> Arguments:
    make = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, length, HEADS, *shape, generator=make)

    q, k, v = draw(KEYS), draw(KEYS), draw(VALUES)
    if rule == "delta":
        k = torch.nn.functional.normalize(k, dim=-1)
    log = None
    if decay == "head":
        log = torch.log1p(-(2.0 ** (-5 - torch.arange(HEADS))))
    elif decay != "none":
        gate = draw(KEYS) if decay == "channel" else draw()
        log = -5 * torch.sigmoid(gate) if decay == "channel" else -torch.nn.functional.softplus(gate)
    beta = 2 * torch.sigmoid(draw()) if rule == "delta" else None
    state = torch.randn(BATCH, HEADS, KEYS, VALUES, generator=make)
    return q, k, v, log, beta, torch.zeros_like(state) if oracle == "retention" else state


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("oracle", ORACLES)
def test_agrees(oracle: str, length: int, name: str) -> None:
    theirs, decay, rule = ORACLES[oracle]
    ours, dtype = form(name)
    given = inputs(decay, rule, length, oracle)
    # The decays of retention are constants of its paper, and it takes no state.
    fixed = {3, 5} if oracle == "retention" else set()
    named = ("q", "k", "v", "decay", "beta", "state")
    results = []
    for run, kind in ((theirs, torch.float32), (ours, dtype)):
        leaves = [
            None if x is None else x.to(kind).requires_grad_(number not in fixed)
            for number, x in enumerate(given)
        ]
        o, final = run(*leaves)
        weights = torch.Generator().manual_seed(0)
        loss = (o * torch.randn(o.shape, generator=weights)).sum()
        if oracle != "retention":
            loss = loss + (final * torch.randn(final.shape, generator=weights)).sum()
        wanted = [
            (f"d{named[number]}", x) for number, x in enumerate(leaves) if x is not None and x.requires_grad
        ]
        gradients = torch.autograd.grad(loss, [x for _, x in wanted])
        found = {"o": o, **dict(zip([label for label, _ in wanted], gradients, strict=True))}
        results.append(found if final is None or oracle == "retention" else {**found, "final state": final})
    expected, actual = results
    assert expected.keys() == actual.keys()
    for label, value in expected.items():
        assert_close(f"{oracle} {name} {label}", actual[label].detach(), value.detach(), RATIO)
