"""The gated short convolution as a float64 loop."""

from __future__ import annotations

import pytest
import torch

from mixforge.search_space.mixers.conv import Conv
from mixforge.search_space.parts.layer import Pass


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 3, 8])
def test_gated_convolution_is_its_equation(size: int) -> None:
    width, length = 10, 13
    torch.manual_seed(0)
    module = Conv(size=size).build(width, "torch").build().double()
    w = dict(module.named_parameters())
    x = torch.randn(length, width, dtype=torch.float64)
    b, c, v = (x @ each.T for each in w["mixed.weight"].chunk(3))
    rows = []
    for t in range(length):
        y = torch.zeros(width, dtype=torch.float64)
        for back in range(min(size, t + 1)):
            y += w["conv.weight"][:, size - 1 - back] * b[t - back] * v[t - back]
        rows.append(w["out.weight"] @ (c[t] * y))
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows))
