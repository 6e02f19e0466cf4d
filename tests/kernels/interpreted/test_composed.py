"""Operations that are made of other operations' kernels, against the recurrences in float64, with every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_agree, assert_close
from torch import Tensor

from mixforge.kernels import log_linear, second_order, slot_attention, softmax_scan

# Sums of decays are differenced in float32.
RATIO = 1e-5


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "decay", [None, -uniform(1, 70, 2), -uniform(1, 70, 2, 5)], ids=["none", "scalar", "channel"]
)
def test_second_order(decay: Tensor | None) -> None:
    inputs = [normal(1, 70, 1, 5), normal(1, 70, 1, 5), normal(1, 70, 2, 7), decay, None, normal(1, 2, 5, 12)]
    forms = (second_order.form("triton"), second_order.form("reference"))
    assert_agree(*forms, inputs, RATIO)
    assert_agree(*forms, [*inputs[:-1], None], RATIO)


def assert_steps_agree(
    steps: tuple[Callable[..., tuple[Tensor, Tensor]], ...], inputs: list[Tensor | None], state: Tensor
) -> None:
    """Tokens of the second step in float64, the state of the first in its place; and the gradients of one token."""
    wide = state.double()
    with torch.no_grad():
        kept = state.clone()
        for t in range(inputs[0].shape[1]):
            now = [None if x is None else x[:, t] for x in inputs]
            o, same = steps[0](*now, kept)
            assert same is kept
            expected, wide = steps[1](*(None if x is None else x.double() for x in now), wide)
            assert_close("output", o, expected, RATIO)
            assert_close("state", kept, wide, RATIO)
    assert_agree(*steps, [*(None if x is None else x[:, 0] for x in inputs), state], RATIO)


@pytest.mark.parametrize(
    "decay", [None, -uniform(3, 4, 2), -uniform(3, 4, 2, 5)], ids=["none", "scalar", "channel"]
)
def test_steps_of_second_order(decay: Tensor | None) -> None:
    inputs = [normal(3, 4, 1, 5), normal(3, 4, 1, 5), normal(3, 4, 2, 7), decay, None]
    steps = (second_order.step_form("triton"), second_order.step_form("torch"))
    assert_steps_agree(steps, inputs, normal(3, 2, 5, 12))


@pytest.mark.parametrize("heads", [1, 2])
def test_steps_of_slots(heads: int) -> None:
    inputs = [normal(3, 4, 1, 6), normal(3, 4, 1, 6), normal(3, 4, heads, 9), -uniform(3, 4, heads, 5), None]
    steps = (slot_attention.step_form("triton"), slot_attention.step_form("torch"))
    assert_steps_agree(steps, inputs, normal(3, heads, 5, 15))


@pytest.mark.parametrize("length", [1, 37])
def test_slots(length: int) -> None:
    inputs = [
        normal(1, length, 1, 6),
        normal(1, length, 1, 6),
        normal(1, length, 2, 9),
        -uniform(1, length, 2, 5),
    ]
    forms = (slot_attention.form("triton"), slot_attention.form("reference"))
    assert_agree(*forms, [*inputs, None, normal(1, 2, 5, 15)], RATIO)


@pytest.mark.parametrize("length", [1, 13, 65])
def test_softmax_scan(length: int) -> None:
    def run(name: str, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        half = length // 2
        o, carry = softmax_scan.form(name)(z[:, :, : half + 1], v[:, :, : half + 1], None)
        if length > 1:
            later, carry = softmax_scan.form(name)(z[:, :, half + 1 :], v[:, :, half + 1 :], carry)
            o = torch.cat([o, later], 2)
        return o, carry[2] / carry[1][..., None]

    scores = 5 * normal(2, 3, length)
    scores[:, :, ::5] = 3000.0 if length == 65 else 0.0
    assert_agree(
        lambda *x: run("triton", *x), lambda *x: run("reference", *x), [scores, normal(2, 3, length, 5)]
    )


def log_linear_inputs(length: int, *, is_delta: bool) -> list[Tensor | None]:
    q, k = normal(2, length, 1, 5), F.normalize(normal(2, length, 1, 5) + 1, dim=-1)
    beta = 2 * uniform(2, length, 2) if is_delta else None
    return [q, k, normal(2, length, 2, 7), -0.1 * uniform(2, length, 2), beta, None, uniform(2, length, 2, 7)]


@pytest.mark.parametrize("is_delta", [False, True])
@pytest.mark.parametrize("length", [1, 33, 150])
def test_log_linear(length: int, is_delta: bool) -> None:
    forms = (log_linear.form("triton"), log_linear.form("reference"))
    assert_agree(
        lambda *x: forms[0](*x)[0],
        lambda *x: forms[1](*x)[0],
        log_linear_inputs(length, is_delta=is_delta),
        RATIO,
    )


@torch.no_grad()
@pytest.mark.parametrize("is_delta", [False, True])
def test_log_linear_in_pieces(is_delta: bool) -> None:
    """Its state after each piece is the loop's: pieces that begin in any half of a bucket, and end there."""
    q, k, v, decay, beta, _, weight = log_linear_inputs(330, is_delta=is_delta)
    states = [torch.zeros(2, 2, 9, 5, 7, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    done = 0
    for piece in (70, 59, 64, 1, 136):
        given = [None if x is None else x[:, done : done + piece] for x in (q, k, v, decay, beta, weight)]
        outputs = []
        for n, name in enumerate(("triton", "reference")):
            *part, of_levels = (None if x is None else x.to(states[n].dtype) for x in given)
            o, states[n] = log_linear.form(name)(*part, states[n], of_levels, done)
            outputs.append(o)
        assert_close("output", *outputs, RATIO)
        assert_close("state", *states, RATIO)
        done += piece
