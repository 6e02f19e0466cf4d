"""Avey's ranker and neural processor as float64 loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixforge.search_space.mixers.avey import Avey
from mixforge.search_space.parts.layer import Pass


def cos(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y) / ((x @ x + 1e-8) * (y @ y + 1e-8)).sqrt()


@torch.no_grad()
@pytest.mark.parametrize(("split", "splits"), [(4, 3), (3, 2), (5, 1), (2, 9), (64, 3)])
def test_avey_is_its_equations(split: int, splits: int) -> None:
    width, length = 6, 23
    torch.manual_seed(0)
    module = Avey(split=split, splits=splits, expand=3).build(width, "torch").build().double()
    w = dict(module.named_parameters())
    x = torch.randn(length, width, dtype=torch.float64)
    z = (x @ w["enricher.weight"].T).clamp(min=0) ** 2
    mixing = int(3 * width * 0.5 / 2)
    a, gate, passing = z[:, :mixing], z[:, mixing : 2 * mixing], z[:, 2 * mixing :]
    rows = []
    for t in range(length):
        n = t // split
        worth = {
            s: sum(
                max(cos(x[q], x[j]).item() for j in range(s * split, (s + 1) * split))
                for q in range((n - 1) * split, n * split)
            )
            for s in range(n)
        }
        chosen = sorted(sorted(worth, key=lambda s: -worth[s])[: splits - 1])
        seen = [
            (s * split + i, max(0.0, worth[s] / max(worth.values()))) for s in chosen for i in range(split)
        ]
        seen += [(j, 1.0) for j in range(n * split, n * split + split)]
        context = torch.zeros(mixing, dtype=torch.float64)
        for column, (j, r) in enumerate(seen, splits * split - len(seen)):
            if j <= t:
                context += w["place"][t % split, column] * cos(a[t], a[j]) * r**2 * a[j]
        rows.append(w["out.weight"] @ torch.cat([context * gate[t], passing[t]]))
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_the_split_before_is_always_chosen_with_full_weight() -> None:
    module = Avey(split=4, splits=2).build(6, "torch").build().double()
    chosen, weight = module._ranked(torch.randn(2, 20, 6, dtype=torch.float64), 0, 1)
    assert chosen[:, 1:, 0].tolist() == [[0, 1, 2, 3, 4]] * 2
    torch.testing.assert_close(weight[:, 1:], torch.ones(2, 5, 1, dtype=torch.float64))
    assert weight[:, 0].abs().max() == 0


@torch.no_grad()
def test_splits_of_one_worth_are_chosen_alike_in_every_form() -> None:
    """Tokens that come again, as in any text, make splits that are as like as each other."""
    module = Avey(split=2, splits=2).build(6, "torch").build()
    few = torch.randn(3, 6)
    x_BTD = few[torch.randint(3, (2, 60), generator=torch.Generator().manual_seed(0))]
    whole, _ = module(x_BTD, None, Pass(torch.arange(60), 0))
    state = module.initial_state(2, 60, x_BTD.device, x_BTD.dtype)
    for t in range(60):
        y_BD, state = module.step(x_BTD[:, t], state, Pass(torch.arange(t, t + 1), 0))
        torch.testing.assert_close(y_BD, whole[:, t], rtol=1e-4, atol=1e-5)
