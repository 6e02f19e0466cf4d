"""The recurrence that decays along keys and values: chunks against the loop, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixforge.kernels.twofold_linear import (
    twofold_linear_reference,
    twofold_linear_torch,
    twofold_step,
)


def inputs(length: int, dtype: torch.dtype, least: float = -5.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, length, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, length, 3, 7, generator=generator, dtype=torch.float64)
    g, h = (least * torch.rand(x.shape, generator=generator, dtype=torch.float64) for x in (q, v))
    state = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, h, state)]


@pytest.mark.parametrize("length", [1, 13, 63])
@pytest.mark.parametrize("least", [-5.0, -0.1])
def test_chunks_equal_the_loop_and_so_do_their_gradients(length: int, least: float) -> None:
    given = inputs(length, torch.float64, least)
    weight = torch.randn(2, length, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (twofold_linear_reference, twofold_linear_torch):
        o, state = run(*given)
        loss = (o * weight).sum() + state.square().sum()
        found.append([o, state, *torch.autograd.grad(loss, given)])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_decays_at_their_floor_stay_inside_float32() -> None:
    given = inputs(63, torch.float32)
    for log in given[3:5]:
        log.data.fill_(-5.0)
    o, _ = twofold_linear_torch(*given)
    expected, _ = twofold_linear_reference(*given)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_steps_equal_the_loop() -> None:
    q, k, v, g, h, state = inputs(13, torch.float64)
    expected, last = twofold_linear_reference(q, k, v, g, h, state)
    for t in range(13):
        o, state = twofold_step(q[:, t], k[:, t], v[:, t], g[:, t], h[:, t], state)
        torch.testing.assert_close(o, expected[:, t])
    torch.testing.assert_close(state, last)


def test_what_does_not_fit_is_named() -> None:
    q, k, v, g, h, state = inputs(3, torch.float32)
    with pytest.raises(ValueError, match=r"value_decay must lie in \[-5, 0\], got -6"):
        twofold_linear_torch(q, k, v, g, torch.full_like(h, -6.0), state)
    with pytest.raises(ValueError, match="decay has shape"):
        twofold_linear_torch(q, k, v, h, h, state)
