"""Static mixing as a float64 loop."""

from __future__ import annotations

import pytest
import torch

from mixforge.search_space.mixers.static import Static
from mixforge.search_space.parts.layer import Pass


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 5, 13, 64])
def test_static_mixing_is_its_equation(window: int) -> None:
    width, heads, length = 12, 3, 29
    torch.manual_seed(0)
    module = Static(window=window, heads=heads).build(width, "torch").build().double()
    module.mixing.filter.normal_()
    w = dict(module.named_parameters())
    x = torch.randn(length, width, dtype=torch.float64)
    v = (x @ w["value.weight"].T).view(length, heads, -1)
    rows = []
    for t in range(length):
        y = torch.zeros(heads, width // heads, dtype=torch.float64)
        for s in range(min(window, t + 1)):
            y += w["mixing.filter"][:, s, None] * v[t - s]
        rows.append(w["out.weight"] @ y.flatten())
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows))


@torch.no_grad()
@pytest.mark.parametrize("matrix", ["random", "learned"])
@pytest.mark.parametrize("window", [2, 5, 13, 64])
def test_softmax_of_fixed_scores_is_its_equation(matrix: str, window: int) -> None:
    width, heads, length = 12, 3, 29
    torch.manual_seed(0)
    module = Static(matrix=matrix, window=window, heads=heads).build(width, "torch").build().double()
    score = module.mixing.score
    assert isinstance(score, torch.nn.Parameter) == (matrix == "learned")
    x = torch.randn(length, width, dtype=torch.float64)
    v = (x @ module.value.weight.T).view(length, heads, -1)
    rows = []
    for t in range(length):
        seen = range(max(0, t - window + 1), t + 1)
        weight = torch.stack([score[:, t % window, s % window].exp() for s in seen])
        y = sum(weight[n, :, None] * v[s] for n, s in enumerate(seen)) / weight.sum(0)[:, None]
        rows.append(module.out.weight @ y.flatten())
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows))


@pytest.mark.parametrize("matrix", ["toeplitz", "random", "learned"])
def test_mixing_does_not_depend_on_the_input(matrix: str) -> None:
    """y(a + b) = y(a) + y(b)."""
    module = Static(matrix=matrix, heads=2).build(12, "torch").build().double()
    a, b = torch.randn(2, 1, 29, 12, dtype=torch.float64)
    at = Pass(torch.arange(29), 0)
    torch.testing.assert_close(module(a + b, None, at)[0], module(a, None, at)[0] + module(b, None, at)[0])
