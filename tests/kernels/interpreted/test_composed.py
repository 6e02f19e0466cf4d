"""Operations that are made of other operations' kernels, against the recurrences in float64, with every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_agree, assert_close
from torch import Tensor

from mixforge.kernels import (
    diagonal_ssm,
    diagonal_ssm_step_triton,
    log_linear,
    log_linear_step_triton,
    second_order,
    slot_attention,
    softmax_scan,
    softmax_scan_step_triton,
)

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


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@torch.no_grad()
@pytest.mark.parametrize("poles", [1, 3, 21])
@pytest.mark.parametrize("is_complex", [False, True])
def test_steps_of_diagonal_states(is_complex: bool, poles: int) -> None:
    planes = 2 if is_complex else 1
    # Some thousand radians, as a fast pole of a long step has.
    frequency = 2000 * normal(5, poles) if is_complex else None
    fixed = [-uniform(5, poles), frequency, normal(5, poles, planes)]
    state = normal(3, 5, poles, planes)
    wide, exact = state.double(), [None if x is None else x.double() for x in fixed]
    for t in range(4):
        x = normal(3 + t, 5)[:3]
        y, same = diagonal_ssm.step_form("triton")(x, *fixed, state)
        assert same is state
        expected, wide = diagonal_ssm.step_form("torch")(x.double(), *exact, wide)
        assert_close("output", y, expected, RATIO)
        assert_close("state", state, wide, RATIO)
    torch.library.opcheck(diagonal_ssm_step_triton.one_step, (x, *fixed, state), test_utils=CHECKS)
    with pytest.raises(ValueError, match="it must be float32 and contiguous"):
        diagonal_ssm.step_form("triton")(x, *fixed, state.half())
    with pytest.raises(ValueError, match="rate has shape"):
        diagonal_ssm.step_form("triton")(x[:, :4], *fixed, state)


@torch.no_grad()
@pytest.mark.parametrize("dim", [5, 40])
def test_steps_of_the_softmax_scan(dim: int) -> None:
    scores, values = 5 * normal(2, 3, 6), normal(2, 3, 6, dim)
    scores[:, :, 4] = 3000.0
    carry = softmax_scan.first_carry(values)
    wide = softmax_scan.first_carry(values.double())
    for t in range(6):
        o = softmax_scan.step_form("triton")(scores[:, :, t], values[:, :, t], carry)
        expected = softmax_scan.step_form("torch")(scores[:, :, t].double(), values[:, :, t].double(), wide)
        assert_close("output", o, expected)
        for name, kept, right in zip(("top", "weight", "sum"), carry, wide, strict=True):
            assert_close(name, kept, right)
    given = (scores[:, :, 0].contiguous(), values[:, :, 0].contiguous(), *carry)
    torch.library.opcheck(softmax_scan_step_triton.one_step, given, test_utils=CHECKS)
    with pytest.raises(ValueError, match="it must be float32 and contiguous"):
        softmax_scan.step_form("triton")(
            scores[:, :, 0], values[:, :, 0], tuple(kept.half() for kept in carry)
        )


@torch.no_grad()
@pytest.mark.parametrize("is_delta", [False, True])
@pytest.mark.parametrize("kind", ["none", "head", "scalar"])
def test_steps_of_log_linear(kind: str, is_delta: bool) -> None:
    """Twenty tokens merge four levels; a token's levels beyond the last weight take that one."""
    q, k, v, decay, beta, _, weight = log_linear_inputs(20, is_delta=is_delta)
    weight = weight[..., :4]
    state = torch.zeros(2, 2, 5, 5, 7)
    wide = state.double()
    for t in range(20):
        of = {"none": None, "head": decay[0, 0], "scalar": decay[:, t]}[kind]
        at = torch.arange(20)[t]
        now = [q[:, t], k[:, t], v[:, t], of, None if beta is None else beta[:, t]]
        o, same = log_linear.step_form("triton")(*now, state, weight[:, t], at)
        assert same is state
        exact = [None if x is None else x.double() for x in now]
        expected, wide = log_linear.step_form("torch")(*exact, wide, weight[:, t].double(), at)
        assert_close("output", o, expected, RATIO)
        assert_close("state", state, wide, RATIO)
    torch.library.opcheck(
        log_linear_step_triton.one_step, (*now, state, weight[:, t].contiguous(), at), test_utils=CHECKS
    )


@torch.no_grad()
def test_steps_of_log_linear_over_wide_keys() -> None:
    """Under rule add keys are summed over groups of 128 channels; under rule delta they are refused."""
    q, k, v = normal(1, 1, 300), normal(1, 1, 300), normal(1, 2, 3)
    state, weight, at = normal(1, 2, 3, 300, 3), uniform(1, 2, 4), torch.tensor(3)
    exact = [x.double() for x in (q, k, v)]
    expected, after = log_linear.step_form("torch")(*exact, None, None, state.double(), weight.double(), at)
    found = state.clone()
    o, _ = log_linear.step_form("triton")(q, k, v, None, None, found, weight, at)
    assert_close("output", o, expected, RATIO)
    assert_close("state", found, after, RATIO)
    with pytest.raises(ValueError, match="takes at most 256"):
        log_linear.step_form("triton")(q, k, v, None, uniform(1, 2), state, weight, at)


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
    pieces = (70, 59, 64, 1, 5, 6, 51, 74)
    q, k, v, decay, beta, _, weight = log_linear_inputs(sum(pieces), is_delta=is_delta)
    states = [torch.zeros(2, 2, 9, 5, 7, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    done = 0
    for piece in pieces:
        given = [None if x is None else x[:, done : done + piece] for x in (q, k, v, decay, beta, weight)]
        outputs = []
        for n, name in enumerate(("triton", "reference")):
            *part, of_levels = (None if x is None else x.to(states[n].dtype) for x in given)
            o, states[n] = log_linear.form(name)(*part, states[n], of_levels, done)
            outputs.append(o)
        assert_close("output", *outputs, RATIO)
        assert_close("state", *states, RATIO)
        done += piece
