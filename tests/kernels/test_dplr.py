"""The recurrence with a removal key of its own: chunks against the loop, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixforge.kernels.dplr import dplr_reference, dplr_step, dplr_torch, matmul_flops

KEYS, VALUES = 5, 7


def inputs(length: int, dtype: torch.dtype, least: float = -5.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, a = (draw(2, length, 3, KEYS) for _ in range(3))
    v = draw(2, length, 3, VALUES)
    a = F.normalize(a, dim=-1)
    b = a * torch.sigmoid(draw(2, length, 3, KEYS))
    g = least * torch.rand(q.shape, generator=generator, dtype=torch.float64)
    state = draw(2, 3, KEYS, VALUES)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, torch.stack([a, b], -2), state)]


@pytest.mark.parametrize("length", [1, 13, 63])
@pytest.mark.parametrize("least", [-5.0, -0.1, None])
def test_chunks_equal_the_loop_and_so_do_their_gradients(length: int, least: float | None) -> None:
    q, k, v, g, removal, state = inputs(length, torch.float64, -1 if least is None else least)
    given = [q, k, v, *([] if least is None else [g]), removal, state]
    weight = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (dplr_reference, dplr_torch):
        o, last = run(q, k, v, None if least is None else g, removal, state)
        found.append([o, last, *torch.autograd.grad((o * weight).sum() + last.square().sum(), given)])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_decays_at_their_floor_stay_inside_float32() -> None:
    q, k, v, g, removal, state = inputs(63, torch.float32)
    g.data.fill_(-5.0)
    o, _ = dplr_torch(q, k, v, g, removal, state)
    expected, _ = dplr_reference(q, k, v, g, removal, state)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    o.sum().backward()
    for given in (q, k, v, g, removal):
        assert torch.isfinite(given.grad).all()


@torch.no_grad()
def test_keys_that_resemble_one_another_lose_nothing() -> None:
    q, k, v, g, removal, state = inputs(63, torch.float32, -0.01)
    alike = F.normalize(removal[:, :1, :, :1] + 0.1 * removal[:, :, :, :1], dim=-1)
    removal = torch.cat([alike, 0.99 * alike], -2)
    o, _ = dplr_torch(q, k, v, g, removal, state)
    given = [x.double() for x in (q, k, v, g, removal, state)]
    torch.testing.assert_close(o.double(), dplr_reference(*given)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_steps_equal_the_loop() -> None:
    q, k, v, g, removal, state = inputs(13, torch.float64)
    expected, last = dplr_reference(q, k, v, g, removal, state)
    for t in range(13):
        o, state = dplr_step(q[:, t], k[:, t], v[:, t], g[:, t], removal[:, t], state)
        torch.testing.assert_close(o, expected[:, t])
    torch.testing.assert_close(state, last)


@torch.no_grad()
def test_flops_are_exact() -> None:
    for length in (1, 16, 63):
        with FlopCounterMode(display=False) as counter:
            dplr_torch(*inputs(length, torch.float32)[:5])
        sizes = {"heads": 3, "key_dim": KEYS, "value_dim": VALUES}
        assert counter.get_total_flops() == 2 * matmul_flops(length, **sizes)


def test_what_does_not_fit_is_named() -> None:
    q, k, v, g, removal, _ = inputs(3, torch.float32)
    with pytest.raises(ValueError, match=r"removal has shape \[2, 3, 3, 1, 5\]"):
        dplr_torch(q, k, v, g, removal[..., :1, :])
    with pytest.raises(ValueError, match="k has shape"):
        dplr_torch(q, k[:, :2], v, g, removal)
    with pytest.raises(ValueError, match=r"decay must lie in \[-5, 0\]"):
        dplr_reference(q, k, v, 2 * g - 5, removal)
    with pytest.raises(ValueError, match="v has shape"):
        dplr_torch(q, k, v[:, :2], g, removal)
