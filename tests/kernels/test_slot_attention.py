"""Attention to slots: chunks against the loop, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixforge.kernels.slot_attention import (
    matmul_flops,
    slot_attention_reference,
    slot_attention_torch,
)

KEYS, VALUES, SLOTS = 5, 7, 3


def inputs(length: int, dtype: torch.dtype, least: float = -5.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (2, length, 2, KEYS),
        (2, length, 2, KEYS),
        (2, length, 4, VALUES),
        (2, 4, SLOTS, VALUES + KEYS),
    )
    q, k, v, state = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    g = least * torch.rand(2, length, 4, SLOTS, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, state)]


@pytest.mark.parametrize("length", [1, 13, 63])
@pytest.mark.parametrize("least", [-5.0, -0.1])
def test_chunks_equal_the_loop_and_so_do_their_gradients(length: int, least: float) -> None:
    q, k, v, g, state = inputs(length, torch.float64, least)
    weight = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (slot_attention_reference, slot_attention_torch):
        o, last = run(q, k, v, g, None, state)
        loss = (o * weight).sum() + last.square().sum()
        found.append([o, last, *torch.autograd.grad(loss, (q, k, v, g, state))])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_the_loop_is_the_papers() -> None:
    q, k, v, g, _ = inputs(11, torch.float64)
    o, _ = slot_attention_reference(q, k, v, g)
    for h in range(4):
        keys = torch.zeros(SLOTS, KEYS, dtype=torch.float64)
        values = torch.zeros(SLOTS, VALUES, dtype=torch.float64)
        for t in range(11):
            alpha = g[0, t, h].exp()
            keys = alpha[:, None] * keys + torch.outer(1 - alpha, k[0, t, h // 2])
            values = alpha[:, None] * values + torch.outer(1 - alpha, v[0, t, h])
            weight = (keys @ q[0, t, h // 2]).exp()
            torch.testing.assert_close(o[0, t, h], values.T @ (weight / weight.sum()))


@torch.no_grad()
def test_flops_are_exact() -> None:
    q, k, v, g, _ = inputs(37, torch.float32)
    with FlopCounterMode(display=False) as counter:
        slot_attention_torch(q, k, v, g)
    sizes = {"heads": 4, "key_dim": KEYS, "value_dim": VALUES, "slots": SLOTS}
    assert counter.get_total_flops() == 2 * matmul_flops(37, **sizes)


def test_what_does_not_fit_is_named() -> None:
    q, k, v, g, _ = inputs(3, torch.float32)
    with pytest.raises(ValueError, match="k has shape"):
        slot_attention_torch(q, k[:, :2], v, g)
    with pytest.raises(ValueError, match="3 value heads are no multiple of 2 key heads"):
        slot_attention_torch(q, k, v[:, :, :3], g)
    with pytest.raises(ValueError, match="decay has shape"):
        slot_attention_reference(q, k, v, g[:, :2])
    for run in (slot_attention_torch, slot_attention_reference):
        with pytest.raises(ValueError, match="q has a length of 0"):
            run(*(x[:, :0] for x in (q, k, v, g)))
        with pytest.raises(ValueError, match="state has shape"):
            run(q, k, v, g, None, torch.zeros(2, 2, SLOTS, KEYS + VALUES))
