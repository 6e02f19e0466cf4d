"""The norms whose derivative is written out, against autograd through their equations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.norm import quotient_norm, rms_norm_reference, rms_norm_torch, unit_norm


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    dice = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=dice, dtype=torch.float64).to(dtype).requires_grad_()


def unit_by_the_equation(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def quotient_by_the_equation(least: Tensor, o: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x, n = o[..., :-1], o[..., -1:]
    quotient = x / (n.abs().clamp(min=least) + 1e-6)
    return F.layer_norm(quotient, x.shape[-1:], eps=1e-5) * weight + bias


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


def by_quotient_norm(least: Tensor) -> Callable[..., Tensor]:
    return lambda o, weight, bias: quotient_norm(o, least, weight, bias)


@pytest.mark.parametrize("shape", [(2, 3), (1, 1, 5), (2, 3, 4, 24)])
@pytest.mark.parametrize("is_one", [True, False])
def test_norm_of_a_quotient_and_its_gradients(shape: tuple[int, ...], is_one: bool) -> None:
    inputs = (draw(*shape[:-1], shape[-1] + 1), draw(*shape[-2:]), draw(*shape[-2:]))
    # Some of what divides is below it, some of another sign.
    least = torch.tensor(0.5, dtype=torch.float64) if is_one else draw(*shape[:-1], 1).detach().abs()
    expected = gradients(partial(quotient_by_the_equation, least), inputs)
    for found, wanted in zip(gradients(by_quotient_norm(least), inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_norm_of_a_quotient_by_what_is_infinite_is_the_bias() -> None:
    inputs = tuple(draw(*shape, dtype=torch.float32) for shape in ((3, 2, 9), (2, 8), (2, 8)))
    y, *grads = gradients(by_quotient_norm(torch.tensor(torch.inf)), inputs)
    assert torch.equal(y, inputs[2].detach().expand_as(y))
    assert all(x.isfinite().all() for x in grads)


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
