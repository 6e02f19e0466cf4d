"""Gated units against the equations of their paper (arXiv 2002.05202)."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from mixforge.search_space.mixers.glu import Glu

EQUATIONS = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "none": lambda z: z,
}


@torch.no_grad()
@pytest.mark.parametrize("act", EQUATIONS)
def test_gated_unit_is_its_equation(act: str) -> None:
    module = Glu(act=act).build(10, "torch").build().double()
    w = dict(module.named_parameters())
    x = torch.randn(7, 10, dtype=torch.float64)
    for row, y in zip(x, module(x), strict=True):
        gate = EQUATIONS[act](w["gate.weight"] @ row)
        torch.testing.assert_close(y, w["out.weight"] @ (gate * (w["up.weight"] @ row)))


def test_hidden_width_follows_from_the_width() -> None:
    assert Glu().hidden(128) == 344
    assert Glu(expand=2).hidden(128) == 256
    assert Glu(expand=344 / 128).canonical(128) == Glu()
    half = Glu().narrow(128, Fraction(1, 2))
    assert half.hidden(128) == 172
