"""Circular-convolutional attention as a float64 loop, over more blocks than one."""

from __future__ import annotations

import math

import pytest
import torch

from mixforge.search_space.mixers.cat import BLOCK, Cat, shifted_softmax
from mixforge.search_space.parts.layer import Pass


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 13, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 3])
@pytest.mark.parametrize("score", ["token", "averaged"])
def test_weights_of_tokens_are_those_of_lags(score: str, length: int) -> None:
    width, heads, dim = 12, 3, 4
    torch.manual_seed(0)
    module = Cat(heads=heads, score=score).build(width, "torch").build().double()
    w = dict(module.named_parameters())
    x = torch.randn(length, width, dtype=torch.float64)
    v = (x @ w["value.weight"].T).view(length, heads, dim)
    if score == "token":
        z = 3 * x @ w["score.weigh.weight"].T
        w["score.weigh.weight"].mul_(3)
    else:
        w["score.mixed.weight"].mul_(3)
        q, k = (x @ w["score.mixed.weight"].T).view(length, 2, heads, dim).unbind(1)
        z = torch.stack([(q[t] * k[: t + 1].mean(0)).sum(1) / math.sqrt(dim) for t in range(length)])
    rows = []
    for t in range(length):
        weight = torch.exp(z[: t + 1])
        y = sum(weight[s][:, None] * v[t - s] for s in range(t + 1)) / weight.sum(0)[:, None]
        rows.append(w["out.weight"] @ y.flatten())
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows))


def test_the_largest_weight_may_come_last() -> None:
    """Where a later score is larger by more than an exponential in float32 can say, earlier tokens are as they were."""
    torch.manual_seed(0)
    z = torch.linspace(-300, 300, 150)[None, None].requires_grad_()
    v = torch.randn(1, 1, 150, 5)
    y = shifted_softmax(z, v)
    torch.testing.assert_close(y[:, :, :40], shifted_softmax(z[:, :, :40], v[:, :, :40]))
    torch.testing.assert_close(y.double(), shifted_softmax(z.double(), v.double()), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_gradients_are_those_of_all_pairs() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 2, 75, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 2, 75, 3, dtype=torch.float64, requires_grad=True)
    lag = torch.arange(75)[:, None] - torch.arange(75)
    weight = z[..., lag.clamp(min=0)].masked_fill(lag < 0, -torch.inf).softmax(-1)
    upstream = torch.randn(2, 2, 75, 3, dtype=torch.float64)
    expected = torch.autograd.grad(weight @ v, (z, v), upstream)
    found = torch.autograd.grad(shifted_softmax(z, v), (z, v), upstream)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other)
