"""The training loop's own parts."""

from __future__ import annotations

import pytest
import torch

from mixforge.evaluator.seeds import seed_for
from mixforge.evaluator.train import thinned


@pytest.mark.parametrize("count", [1, 99, 100, 101, 250, 1234])
def test_curve_has_at_most_a_hundred_points_and_keeps_the_mean(count: int) -> None:
    losses = [float(step) for step in range(count)]
    curve = thinned("text", losses)
    assert 1 <= len(curve.steps) == len(curve.loss) <= 100
    assert curve.steps[-1] == count
    sizes = [b - a for a, b in zip((0, *curve.steps), curve.steps, strict=False)]
    total = sum(size * loss for size, loss in zip(sizes, curve.loss, strict=True))
    assert total == pytest.approx(sum(losses))


def test_seeds_of_different_purposes_differ_and_stay() -> None:
    seeds = {seed_for(seed, *purpose) for seed in (0, 1) for purpose in (("a", "b"), ("ab",), ("b", "a"))}
    assert len(seeds) == 6
    assert seed_for(0, "mqar", "train") == seed_for(0, "mqar", "train")
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
