"""The feed-forward layer against its equation."""

from __future__ import annotations

import math

import pytest
import torch

from mixforge.search_space.mixers.mlp import Mlp

EQUATIONS = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "relu": lambda z: z.clamp(min=0),
    "relu2": lambda z: z.clamp(min=0) ** 2,
}


@torch.no_grad()
@pytest.mark.parametrize("act", EQUATIONS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_feed_forward_is_its_equation(act: str, bias: str) -> None:
    module = Mlp(act=act, bias=bias).build(10, "torch").build().double()
    w = dict(module.named_parameters())
    assert ("up.bias" in w) == (bias == "all")
    x = torch.randn(7, 10, dtype=torch.float64)
    for row, y in zip(x, module(x), strict=True):
        h = EQUATIONS[act](w["up.weight"] @ row + w.get("up.bias", 0))
        torch.testing.assert_close(y, w["out.weight"] @ h + w.get("out.bias", 0))


def test_hidden_width_is_four_times_the_width() -> None:
    assert Mlp().hidden(96) == 384
    assert Mlp(expand=2.0).canonical(96) == Mlp(expand=2)


def test_one_expand_for_one_hidden_width() -> None:
    assert Mlp(expand=2.005).canonical(48) == Mlp(expand=2)
    assert Mlp(expand=2.1).canonical(48).hidden(48) == Mlp(expand=2.1).hidden(48)
