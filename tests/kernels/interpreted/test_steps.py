"""Single tokens where gradients are wanted: those of every operand, and a state that is left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerance import assert_agree
from torch import Tensor

from mixforge.kernels import (
    diagonal_ssm,
    gated_scan,
    gated_scan_complex,
    selective_scan,
    short_conv,
    softmax_scan,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def negative(*shape: int) -> Tensor:
    return -normal(*shape).abs()


def convolved(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda x, weight, bias, state: short_conv.step_form(backend)(x, weight, bias, "silu", state)


@pytest.mark.parametrize(
    ("step", "inputs"),
    [
        pytest.param(
            gated_scan.step_form, [negative(3, 5), normal(3, 5), normal(3, 5)], id="gated scan"
        ),
        pytest.param(
            gated_scan_complex.step_form,
            [negative(3, 5), normal(3, 5), normal(3, 2, 5), normal(3, 2, 5)],
            id="complex scan",
        ),
        pytest.param(convolved, [normal(3, 5), normal(5, 4), normal(5), normal(3, 5, 3)], id="convolution"),
        pytest.param(
            selective_scan.step_form,
            [normal(3, 5), normal(3, 5).abs(), negative(5, 4), normal(3, 4), normal(3, 4), normal(5), normal(3, 5, 4)],
            id="selective scan",
        ),
        pytest.param(
            diagonal_ssm.step_form,
            [normal(3, 5), negative(5, 4), normal(5, 4), normal(5, 4, 2), normal(3, 5, 4, 2)],
            id="diagonal scan",
        ),
    ],
)  # fmt: skip
def test_a_step_has_gradients(
    step: Callable[[str], Callable[..., tuple[Tensor, Tensor]]], inputs: list[Tensor]
) -> None:
    assert_agree(step("triton"), step("reference"), inputs, 1e-5)
    *others, state = inputs
    before = state.clone()
    step("triton")(others[0].clone().requires_grad_(), *others[1:], state)
    assert torch.equal(state, before)


def test_a_step_of_the_softmax_scan_has_none() -> None:
    z, v = normal(2, 3), normal(2, 3, 5)
    carry = softmax_scan.first_carry(v[:, :, None])
    with pytest.raises(
        ValueError, match=r"requires a gradient, and a step has none: run it under torch\.no_grad"
    ):
        softmax_scan.step_form("triton")(z, v.requires_grad_(), carry)
    with torch.no_grad():
        softmax_scan.step_form("triton")(z, v, carry)
