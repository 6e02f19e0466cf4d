"""RG-LRU against equations 1 to 4 of Griffin (arXiv 2402.19427) as a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch

from mixforge.search_space.mixers.rglru import Rglru
from mixforge.search_space.parts.layer import Pass


@torch.no_grad()
@pytest.mark.parametrize("mixer", [Rglru(heads=3), Rglru(heads=2, head_dim=5, conv="none")], ids=str)
def test_block_is_the_papers_recurrence(mixer: Rglru) -> None:
    width, length = 24, 29
    torch.manual_seed(0)
    module = mixer.build(width, "torch").build().double()
    for gate in (module.recurrence_gate, module.input_gate):
        gate.bias.normal_()
    w = dict(module.named_parameters())
    heads, dim = mixer.sizes(width)
    x = torch.randn(length, width, dtype=torch.float64)
    branch = x @ w["into.weight"].T
    h = torch.zeros(heads * dim, dtype=torch.float64)
    rows = []
    for t in range(length):
        u = branch[t]
        if mixer.conv != "none":
            u = sum(w["conv.weight"][:, -1 - back] * branch[t - back] for back in range(min(4, t + 1)))  # type: ignore[assignment]
        blocks = u.view(heads, dim)
        logits = {
            name: torch.cat([blocks[i] @ w[f"{name}.weight"][i] for i in range(heads)]) + w[f"{name}.bias"]
            for name in ("recurrence_gate", "input_gate")
        }
        r, i = (1 / (1 + torch.exp(-logits[name])) for name in ("recurrence_gate", "input_gate"))
        a = torch.exp(-8 * torch.log1p(torch.exp(w["rate"])) * r)
        h = a * h + torch.sqrt(1 - a * a) * (i * u)
        z = w["gate.weight"] @ x[t]
        gelu = z * (1 + torch.erf(z / math.sqrt(2))) / 2
        rows.append(w["out.weight"] @ (gelu * h))
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows), rtol=1e-6, atol=1e-9)


def test_decay_starts_between_nine_tenths_and_one() -> None:
    module = Rglru().build(64, "torch").build()
    a = torch.exp(-8 * torch.nn.functional.softplus(module.rate))
    assert a.min() >= 0.9
    assert a.max() < 1
