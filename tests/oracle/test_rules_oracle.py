"""Removal keys, slots, levels and the forget gate against fla-core's plain forms: outputs, states, every gradient.

fla computes in float32; where it multiplies queries by K^-0.5 it gets them times K^0.5.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fla.ops.forgetting_attn.naive import naive_forgetting_attn
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.gsa.naive import naive_recurrent_gsa
from fla.ops.log_linear_attn.naive import naive_log_linear_attn
from tolerance import assert_close
from torch import Tensor

from mixforge.kernels import attention, dplr, log_linear, slot_attention
from mixforge.search_space.parts.attention_blocks import Sight
from mixforge.search_space.parts.attention_pattern import EveryToken
from mixforge.search_space.parts.attention_scores import Biased, Terms

# Both sides round in float32, each in its own order.
RATIO = 1e-5
BATCH, HEADS, KEYS, VALUES, SLOTS, LEVELS = 3, 2, 24, 20, 12, 8
# Under the interpreter, the one that has a Triton form.
IS_INTERPRETED = "TRITON_INTERPRET" in os.environ
FORMS = ("triton",) if IS_INTERPRETED else ("reference", "torch")
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.float32, torch.float64)

Run = Callable[..., tuple[Tensor, ...]]


def draw(length: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    make = torch.Generator().manual_seed(length)
    return [torch.randn(BATCH, length, HEADS, *shape, generator=make) for shape in shapes]


def state(*shape: int) -> Tensor:
    return torch.randn(BATCH, HEADS, *shape, generator=torch.Generator().manual_seed(9))


def dplr_theirs(q, k, v, decay, a, b, start):
    turned = (x.transpose(1, 2) for x in (q * KEYS**0.5, k, v, a, -b, decay))
    o, final = dplr_recurrence(*turned, initial_state=start)
    return o.transpose(1, 2), final


def dplr_ours(form: str) -> Run:
    run = dplr.form(form)
    return lambda q, k, v, decay, a, b, start: run(q, k, v, decay, torch.stack([a, b], -2), start)


def dplr_inputs(length: int) -> list[Tensor]:
    q, k, v, gate, a, rate = draw(length, (KEYS,), (KEYS,), (VALUES,), (KEYS,), (KEYS,), (KEYS,))
    a = F.normalize(a, dim=-1)
    return [q, k, v, -5 * torch.sigmoid(gate), a, a * torch.sigmoid(rate), state(KEYS, VALUES)]


def slots_theirs(q, k, v, decay, values, keys):
    o, (hk, hv) = naive_recurrent_gsa(
        q, k, v, -torch.expm1(decay), decay, 1.0, (keys.mT, values), output_final_state=True
    )
    return o, hv, hk.mT


def slots_ours(form: str) -> Run:
    run = slot_attention.FORMS[form]

    def ours(q, k, v, decay, values, keys):
        o, final = run(q, k, v, decay, None, torch.cat([values, keys], -1))
        return o, final[..., :VALUES], final[..., VALUES:]

    return ours


def slots_inputs(length: int) -> list[Tensor]:
    q, k, v, gate = draw(length, (KEYS,), (KEYS,), (VALUES,), (SLOTS,))
    return [q, k, v, -5 * torch.sigmoid(gate), state(SLOTS, VALUES), state(SLOTS, KEYS)]


def levels_theirs(q, k, v, decay, weight):
    return (naive_log_linear_attn(q, k, v, decay, weight),)


def levels_ours(form: str) -> Run:
    run = log_linear.FORMS[form]
    return lambda q, k, v, decay, weight: run(q, k, v, decay, None, None, weight)[:1]


def levels_inputs(length: int) -> list[Tensor]:
    q, k, v, gate, weight = draw(length, (KEYS,), (KEYS,), (VALUES,), (), (LEVELS,))
    return [q, k, v, -F.softplus(gate), F.softplus(weight)]


def forget_theirs(q, k, v, gate):
    return (naive_forgetting_attn(q, k, v, gate),)


def forget_ours(form: str) -> Run:
    def ours(q, k, v, gate):
        scores = Biased(KEYS**-0.5, Terms(True, None), 0, attention.masked_form(form))
        position = torch.arange(q.shape[1])
        sums = {"forget": gate.cumsum(1).transpose(1, 2)[..., None]}
        sight = Sight(position, position, EveryToken(attention.form(form)), sums, sums, None, 0, q)
        return (scores(*(x.transpose(1, 2) for x in (q, k, v)), sight).transpose(1, 2),)

    return ours


def forget_inputs(length: int) -> list[Tensor]:
    q, k, v, gate = draw(length, (KEYS,), (KEYS,), (VALUES,), ())
    return [q, k, v, F.logsigmoid(gate)]


ORACLES = {
    "dplr": (dplr_theirs, dplr_ours, dplr_inputs),
    "gsa": (slots_theirs, slots_ours, slots_inputs),
    "log_linear": (levels_theirs, levels_ours, levels_inputs),
    "forgetting_attn": (forget_theirs, forget_ours, forget_inputs),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 13, 70])
@pytest.mark.parametrize("oracle", ["dplr"] if IS_INTERPRETED else ORACLES)
def test_agrees(oracle: str, length: int, dtype: torch.dtype, form: str) -> None:
    theirs, ours, inputs = ORACLES[oracle]
    given = inputs(length)
    results = []
    for run, kind in ((theirs, torch.float32), (ours(form), dtype)):
        leaves = [x.to(kind).requires_grad_() for x in given]
        outputs = run(*leaves)
        weights = torch.Generator().manual_seed(0)
        loss = sum((x * torch.randn(x.shape, generator=weights)).sum() for x in outputs)
        gradients = torch.autograd.grad(loss, leaves)
        results.append([x.detach() for x in (*outputs, *gradients)])
    for number, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert_close(f"{oracle} {form} {number}", actual, expected, RATIO)
