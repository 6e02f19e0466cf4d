"""The norms whose derivative is written out, against autograd through their equations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixforge.kernels.norm import rms_norm_reference, rms_norm_torch, unit_norm


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    dice = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=dice, dtype=torch.float64).to(dtype).requires_grad_()


def unit_by_the_equation(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def gradients(norm: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    y = norm(*inputs)
    return y, *torch.autograd.grad(y, inputs, draw(*y.shape, dtype=y.dtype).detach() + 0.5)


@pytest.mark.parametrize("shape", [(3,), (1, 5), (2, 3, 4, 24)])
def test_root_mean_square_and_its_gradients(shape: tuple[int, ...]) -> None:
    inputs = (draw(*shape), draw(shape[-1]))
    expected = gradients(rms_norm_reference, inputs)
    for found, wanted in zip(gradients(rms_norm_torch, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(3,), (1, 5), (2, 3, 4, 24)])
def test_unit_norm_and_its_gradient(shape: tuple[int, ...]) -> None:
    inputs = (draw(*shape),)
    expected = gradients(unit_by_the_equation, inputs)
    for found, wanted in zip(gradients(unit_norm, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_unit_norm_of_nothing_is_nothing() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y, dx = gradients(unit_norm, (x,))
    assert y.abs().max() == 0
    torch.testing.assert_close(dx, 1e3 * (draw(2, 4, dtype=torch.float32).detach() + 0.5))


def test_inputs_need_not_be_contiguous() -> None:
    x, weight = draw(4, 3, 5).transpose(0, 1), draw(5)
    for norm, others in ((rms_norm_torch, (weight,)), (unit_norm, ())):
        expected = gradients(norm, (x.contiguous(), *others))
        for found, wanted in zip(gradients(norm, (x, *others)), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_unit_norm_keeps_the_dtype() -> None:
    x = draw(6, 16, dtype=torch.bfloat16)
    y = unit_norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float().norm(dim=-1), torch.ones(6), rtol=1e-2, atol=0)
