"""Gated units against the equations of their paper (arXiv 2002.05202)."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.glu import Glu

EQUATIONS = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
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


@torch.no_grad()
def test_clamped_unit_with_biases_is_that_of_gpt_oss() -> None:
    module = Glu(act=Form("clamped", (0.25,)), bias="all").build(10, "torch").build().double()
    w = dict(module.named_parameters())
    x = torch.randn(7, 10, dtype=torch.float64)
    for row, y in zip(x, module(x), strict=True):
        gate = (w["gate.weight"] @ row + w["gate.bias"]).clamp(max=0.25)
        up = (w["up.weight"] @ row + w["up.bias"]).clamp(-0.25, 0.25)
        h = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        torch.testing.assert_close(y, w["out.weight"] @ h + w["out.bias"])


def test_hidden_width_follows_from_the_width() -> None:
    assert Glu().hidden(128) == 344
    assert Glu(expand=2).hidden(128) == 256
    assert Glu(expand=344 / 128).canonical(128) == Glu()
    half = Glu().narrow(128, Fraction(1, 2))
    assert half.hidden(128) == 172
