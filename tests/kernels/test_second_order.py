"""Second-order linear attention: against the paper's states, and chunks against the loop, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixforge.kernels.second_order import (
    matmul_flops,
    second_order_reference,
    second_order_step,
    second_order_torch,
)

KEYS, VALUES = 5, 7


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, 2, KEYS), (2, length, 2, KEYS), (2, length, 4, VALUES), (2, 4, KEYS, VALUES + KEYS))
    found = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in found]


@torch.no_grad()
def test_it_is_the_papers_masked_attention() -> None:
    """o_t = q_t^T (S_t C_t - G_t), the streaming identity, and A A^T under the mask, A the mask of q_t . k_i."""
    q, k, v, _ = inputs(21, torch.float64)
    o, _ = second_order_torch(q, k, v)
    for h in range(4):
        of = h // 2
        pairs = (q[0, :, of] @ k[0, :, of].T).tril()
        torch.testing.assert_close(o[0, :, h], (pairs @ pairs.T).tril() @ v[0, :, h])
        moment = torch.zeros(KEYS, KEYS, dtype=torch.float64)
        cross = torch.zeros(KEYS, VALUES, dtype=torch.float64)
        later = torch.zeros(KEYS, VALUES, dtype=torch.float64)
        for t in range(21):
            outer = torch.outer(k[0, t, of], k[0, t, of])
            later = later + outer @ cross
            moment = moment + outer
            cross = cross + torch.outer(q[0, t, of], v[0, t, h])
            torch.testing.assert_close(o[0, t, h], q[0, t, of] @ (moment @ cross - later))


@pytest.mark.parametrize("length", [1, 13, 63])
@pytest.mark.parametrize("shape", [None, (), (KEYS,)])
def test_chunks_equal_the_loop_and_so_do_their_gradients(length: int, shape: tuple[int, ...] | None) -> None:
    q, k, v, state = inputs(length, torch.float64)
    generator = torch.Generator().manual_seed(1)
    decay = None
    given = [q, k, v, state]
    if shape is not None:
        decay = -torch.rand(2, length, 4, *shape, dtype=torch.float64, generator=generator)
        given.append(decay.requires_grad_())
    weight = torch.randn(v.shape, dtype=torch.float64, generator=generator)
    found = []
    for run in (second_order_reference, second_order_torch):
        o, last = run(q, k, v, decay, None, state)
        found.append([o, last, *torch.autograd.grad((o * weight).sum() + last.square().sum(), given)])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_steps_equal_the_loop() -> None:
    q, k, v, state = inputs(9, torch.float64)
    decay = torch.full((2, 9, 4), -0.1, dtype=torch.float64)
    expected, last = second_order_reference(q, k, v, decay, None, state)
    for t in range(9):
        o, state = second_order_step(q[:, t], k[:, t], v[:, t], decay[:, t], None, state)
        torch.testing.assert_close(o, expected[:, t])
    torch.testing.assert_close(state, last)


@torch.no_grad()
def test_flops_are_exact() -> None:
    q, k, v, _ = inputs(37, torch.float32)
    with FlopCounterMode(display=False) as counter:
        second_order_torch(q, k, v)
    sizes = {"heads": 4, "key_dim": KEYS, "value_dim": VALUES, "decay": "none"}
    assert counter.get_total_flops() == 2 * matmul_flops(37, **sizes)


@pytest.mark.parametrize("run", [second_order_reference, second_order_torch])
def test_what_does_not_fit_is_named(run: Callable[..., tuple[Tensor, Tensor]]) -> None:
    q, k, v, state = inputs(3, torch.float32)
    for given, message in [
        ((q, k[:, :2], v), "k has shape"),
        ((q, k, v[:, :, :3]), "3 value heads are no multiple of 2 key heads"),
        ((q[:, :0], k[:, :0], v[:, :0]), "q has a length of 0"),
        ((q, k, v, None, None, state[:, :1]), r"state has shape .*; it must be \[2, 4, 5, 12\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*given)
