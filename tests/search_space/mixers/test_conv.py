"""Causal convolutions as float64 loops."""

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


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 3, 11])
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("kernel", ["channel", "dense"])
@pytest.mark.parametrize("gate", ["base", "none", "both"])
def test_convolution_of_every_gate_is_its_equation(size: int, dilation: int, kernel: str, gate: str) -> None:
    width, length = 6, 23
    torch.manual_seed(0)
    mixer = Conv(size=size, dilation=dilation, kernel=kernel, gate=gate, act="relu")
    module = mixer.build(width, "torch").build().double()
    w = dict(module.named_parameters())
    for weight in w.values():
        weight.normal_()
    x = torch.randn(length, width, dtype=torch.float64)
    into = out_of = torch.ones_like(x)
    v = x
    if gate == "both":
        into, out_of, v = (x @ each.T for each in w["mixed.weight"].chunk(3))
    rows = []
    for t in range(length):
        y = torch.zeros(width, dtype=torch.float64)
        for j in range(size):
            if t >= j * dilation:
                tap, past = w["conv.weight"][..., size - 1 - j], (into * v)[t - j * dilation]
                y += tap @ past if kernel == "dense" else tap.flatten() * past
        if gate == "base":
            rows.append((w["gate.weight"] @ x[t] + w["gate.bias"]) * (y + w["shift"]))
        else:
            rows.append(w["out.weight"] @ (y * (y > 0) if gate == "none" else out_of[t] * y))
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows))
