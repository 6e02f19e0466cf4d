"""The training loop's own parts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from mixforge.evaluator.candidate import Candidate, asked
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.seeds import seed_for
from mixforge.evaluator.task import Batch
from mixforge.evaluator.train import thinned, train
from mixforge.search_space.notation import parse


@pytest.mark.parametrize("count", [1, 99, 100, 101, 250, 1234])
def test_curve_has_at_most_a_hundred_points_and_keeps_the_mean(count: int) -> None:
    losses = [float(step) for step in range(count)]
    curve = thinned("text", losses)
    assert 1 <= len(curve.steps) == len(curve.loss) <= 100
    assert curve.steps[-1] == count
    sizes = [b - a for a, b in zip((0, *curve.steps), curve.steps, strict=False)]
    total = sum(size * loss for size, loss in zip(sizes, curve.loss, strict=True))
    assert total == pytest.approx(sum(losses))


def chance_batches() -> Iterator[Batch]:
    """Each next token is drawn by itself: nobody can know more of it than that it is one of eight."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens_BT = torch.randint(8, (32, 13), generator=generator)
        yield Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])


@pytest.mark.parametrize(
    "text", ["attn(mask=prefix(11), pos=relative(3))", "linear(init=prefix(11), conv=2, pos=rope)"]
)
def test_a_model_that_copies_what_its_prefix_shows_gains_nothing(text: str) -> None:
    """Where the next tokens of the prefix count, it learns to look them up; behind the prefix there is only chance."""
    losses = []
    for counts in (False, True):
        model = parse(f"lm({text}, width=16, vocab=8)").build()
        assert model.prefix == 11
        if counts:
            model.prefix = 0
        recipe = Recipe(steps=60, batch=32, lr=(2e-2,))
        done = train(
            Candidate(model, None),
            chance_batches(),
            recipe,
            task="chance",
            rate=2e-2,
            deadline=Deadline(60),
        )
        losses.append(sum(done.curve.loss[-3:]) / 3)
    assert losses[0] > 0.98 * math.log(8)
    assert losses[1] < 0.9 * math.log(8)


def test_targets_are_asked_from_the_end_of_the_prefix_on() -> None:
    targets_BT = torch.tensor([[3, -1, 4, 0, 5], [-1, 2, -1, 6, -1]])
    for prefix, first in {0: 0, 1: 0, 2: 1, 4: 3, 5: 4, 6: 5, 9: 5}.items():
        expected = (targets_BT >= 0) & (torch.arange(5) >= first)
        assert torch.equal(asked(targets_BT, prefix), expected)


def test_seeds_of_different_purposes_differ_and_stay() -> None:
    seeds = {seed_for(seed, *purpose) for seed in (0, 1) for purpose in (("a", "b"), ("ab",), ("b", "a"))}
    assert len(seeds) == 6
    assert seed_for(0, "mqar", "train") == seed_for(0, "mqar", "train")
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
