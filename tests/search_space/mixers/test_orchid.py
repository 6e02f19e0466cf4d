"""Orchid as a float64 loop."""

from __future__ import annotations

import pytest
import torch

from mixforge.search_space.mixers.orchid import Orchid
from mixforge.search_space.parts.layer import Pass


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 5, 32])
def test_orchid_is_its_equation(window: int) -> None:
    width, length, taps = 6, 23, 3
    torch.manual_seed(0)
    module = Orchid(window=window, conv=taps).build(width, "torch").build().double()
    w = dict(module.named_parameters())
    x = torch.randn(length, width, dtype=torch.float64)
    p = x @ w["qkv.weight"].T
    short = torch.zeros_like(p)
    for t in range(length):
        for j in range(min(taps, t + 1)):
            short[t] += w["conv.weight"][:, taps - 1 - j] * p[t - j]
    q, k, v = short.chunk(3, 1)
    rows = []
    for t in range(length):
        before = t - t % window
        y = torch.zeros(width, dtype=torch.float64)
        for s in range(min(window, t + 1)):
            h = w["filter"][:, s].clone()
            for j in range(s, before):
                h += q[j] * k[j - s] / before
            y += h * v[t - s]
        rows.append(w["out.weight"] @ ((w["gate.weight"] @ x[t]) * y))
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows))
