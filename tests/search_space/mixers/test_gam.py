"""Gated associative memory as a float64 loop."""

from __future__ import annotations

import torch

from mixforge.search_space.mixers.gam import Gam
from mixforge.search_space.parts.layer import Pass


@torch.no_grad()
def test_gated_associative_memory_is_its_equation() -> None:
    width, length = 6, 11
    torch.manual_seed(0)
    module = Gam(slots=5, conv=3).build(width, "torch").build().double()
    w = dict(module.named_parameters())
    for weight in w.values():
        weight.normal_()
    x = torch.randn(length, width, dtype=torch.float64)
    rows = []
    for t in range(length):
        local = w["shift"] + sum(w["conv.weight"][:, 2 - j] * x[t - j] for j in range(3) if t >= j)
        scores = [torch.exp(x[t] @ slot) for slot in w["bank"]]
        recalled = sum(score * slot for score, slot in zip(scores, w["bank"], strict=True)) / sum(scores)
        gate = 1 / (1 + torch.exp(-(w["gates.weight"] @ x[t] + w["gates.bias"])))
        rows.append(gate[:width] * local + gate[width:] * recalled)
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows))
