"""The scan of a fixed diagonal state space: the fast form against the loop, with a state and in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixforge.kernels.diagonal_ssm import diagonal_ssm_reference, diagonal_ssm_step, diagonal_ssm_torch


def arguments(is_complex: bool, batch: int = 2, length: int = 37, dim: int = 5) -> tuple[Tensor | None, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    planes = 2 if is_complex else 1
    return (
        normal(batch, length, dim),
        -normal(dim, 3).abs() / 4,
        normal(dim, 3) if is_complex else None,
        normal(dim, 3, planes),
        normal(batch, dim, 3, planes),
    )


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("length", [1, 13, 37])
def test_fast_form_and_its_gradients_are_the_loops(is_complex: bool, length: int) -> None:
    results = []
    for operation in (diagonal_ssm_reference, diagonal_ssm_torch):
        given = arguments(is_complex, length=length)
        leaves = [None if each is None else each.requires_grad_() for each in given]
        y_BTD, after = operation(*leaves)  # type: ignore[arg-type]
        assert after is not None
        (y_BTD.square().sum() + (after * after.detach().cos()).sum()).backward()
        results.append([y_BTD, after, *(each.grad for each in leaves if each is not None)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_complex", [False, True])
@torch.no_grad()
def test_pieces_and_steps_are_the_whole(is_complex: bool) -> None:
    x_BTD, rate, frequency, c, state = arguments(is_complex)
    assert x_BTD is not None
    assert rate is not None
    assert c is not None
    assert state is not None
    none, _ = diagonal_ssm_torch(x_BTD, rate, frequency, c)
    whole, _ = diagonal_ssm_torch(x_BTD, rate, frequency, c, torch.zeros_like(state))
    torch.testing.assert_close(none, whole)
    first, after = diagonal_ssm_torch(x_BTD[:, :20], rate, frequency, c, torch.zeros_like(state))
    assert after is not None
    kept = after.clone()
    rows = []
    for x_BD in x_BTD[:, 20:].unbind(1):
        y_BD, after = diagonal_ssm_step(x_BD, rate, frequency, c, after)
        rows.append(y_BD)
    torch.testing.assert_close(torch.cat([first, torch.stack(rows, 1)], 1), whole, rtol=1e-9, atol=1e-9)
    second, last = diagonal_ssm_torch(x_BTD[:, 20:], rate, frequency, c, kept)
    torch.testing.assert_close(second, whole[:, 20:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, after, rtol=1e-9, atol=1e-9)


def test_float32_keeps_its_digits_over_many_turns() -> None:
    """A slow decay with a fast rotation: the kernel's last tokens have turned thousands of times."""
    x = torch.zeros(1, 4000, 1)
    x[0, 0] = 1
    rate, frequency, c = torch.tensor([[-1e-4]]), torch.tensor([[3.1]]), torch.tensor([[[1.0, 0.0]]])
    y, _ = diagonal_ssm_torch(x, rate, frequency, c)
    lag = torch.arange(4000, dtype=torch.float64)
    expected = torch.exp(rate.double()[0, 0] * lag) * torch.cos(frequency.double()[0, 0] * lag)
    assert (y[0, :, 0].double() - expected).abs().max() < 1e-4


def test_shapes_that_do_not_fit_are_named() -> None:
    x, rate, frequency, c, state = arguments(True)
    with pytest.raises(ValueError, match=r"c has shape \[5, 3, 2\]; it must be \[5, 3, 1\]"):
        diagonal_ssm_torch(x, rate, None, c, state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length of 0"):
        diagonal_ssm_reference(x[:, :0], rate, frequency, c)  # type: ignore[index,arg-type]
