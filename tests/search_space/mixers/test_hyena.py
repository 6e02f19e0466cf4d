"""Hyena as a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch

from mixforge.search_space.mixers.hyena import Hyena
from mixforge.search_space.parts.layer import Pass


@torch.no_grad()
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("window", [7, 32])
def test_hyena_is_its_equation(order: int, window: int) -> None:
    width, length, taps = 6, 17, 3
    torch.manual_seed(0)
    module = Hyena(order=order, window=window, filter_width=5).build(width, "torch").build().double()
    w = dict(module.named_parameters())
    x = torch.randn(length, width, dtype=torch.float64)
    p = x @ w["projections.weight"].T
    short = torch.zeros_like(p)
    for t in range(length):
        for j in range(min(taps, t + 1)):
            short[t] += w["conv.weight"][:, taps - 1 - j] * p[t - j]
    *gates, z = short.chunk(order + 1, 1)
    filters = torch.zeros(window, order - 1, width, dtype=torch.float64)
    for t in range(window):
        bands = [1e-4 + j * (15 - 1e-4) / 15 for j in range(16)]
        angles = [2 * math.pi * t / window * f for f in bands]
        u = torch.tensor(
            [t / window, *map(math.cos, angles), *(-math.sin(a) for a in angles)], dtype=torch.float64
        )
        for layer in range(3):
            u = torch.sin(
                w["filters.frequency"]
                * (w[f"filters.hidden.{layer}.weight"] @ u + w[f"filters.hidden.{layer}.bias"])
            )
        h = (w["filters.last.weight"] @ u).view(order - 1, width)
        for d in range(width):
            rate = math.log(100) * (1 / 1.5 + (1 / 0.3 - 1 / 1.5) * d / (width - 1))
            filters[t, :, d] = h[:, d] * (math.exp(-rate * t / window) + 0.05)
    for n in range(order - 1):
        z = z * gates[order - 1 - n]
        mixed = w["skip"][n] * z
        for t in range(length):
            for s in range(min(window, t + 1)):
                mixed[t] += filters[s, n] * z[t - s]
        z = mixed
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], (gates[0] * z) @ w["out.weight"].T)
