"""State tracking: its groups, its data and its score."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.task import Batch
from mixforge.evaluator.tasks.state_tracking import StateTracking, elements, products

GROUPS = {"parity": 2, "Z2": 2, "Z7": 7, "S2": 2, "S3": 6, "S5": 120, "A3": 3, "A4": 12, "A5": 60}


def _task(
    group: str = "S3", length: int = 7, held_out_length: int = 13, examples: int = 300
) -> StateTracking:
    training = Recipe(steps=1, batch=64, lr=(1e-3,))
    return StateTracking(
        group=group, length=length, held_out_length=held_out_length, examples=examples, training=training
    )


@pytest.mark.parametrize(("group", "size"), GROUPS.items())
def test_tables_are_those_of_groups_of_the_right_size(group: str, size: int) -> None:
    table_XX = products(group)
    assert table_XX.shape == (size, size)
    every = torch.arange(size)
    # The identity is element 0, each row and column holds every element once, and products associate.
    assert torch.equal(table_XX[0], every)
    assert torch.equal(table_XX[:, 0], every)
    assert torch.equal(table_XX.sort(0).values, every[:, None].expand(size, size))
    assert torch.equal(table_XX.sort(1).values, every.expand(size, size))
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randint(size, (3, 1000), generator=generator)
    assert torch.equal(table_XX[table_XX[a, b], c], table_XX[a, table_XX[b, c]])


@pytest.mark.parametrize(
    ("group", "commutes"), [("parity", True), ("Z7", True), ("S3", False), ("A5", False)]
)
def test_which_groups_commute(group: str, commutes: bool) -> None:
    assert torch.equal(products(group), products(group).T) is commutes


def test_alternating_groups_hold_what_an_even_number_of_swaps_makes() -> None:
    swaps = [
        tuple(j if at == i else i if at == j else at for at in range(5))
        for i, j in itertools.combinations(range(5), 2)
    ]
    even = {tuple(a[b[at]] for at in range(5)) for a in swaps for b in swaps}
    even |= {tuple(a[b[at]] for at in range(5)) for a in even for b in even}
    assert set(elements("A5")) == even
    assert len(elements("S5")) == math.factorial(5)


def _check_row(inputs_T: list[int], targets_T: list[int], task: StateTracking, *, asked_from: int) -> None:
    """The definition: each permutation is applied after those before it."""
    every = elements(task.group)
    moved = list(range(len(every[0])))
    for at, (read, said) in enumerate(zip(inputs_T, targets_T, strict=True)):
        moved = [every[read][place] for place in moved]
        assert said == (every.index(tuple(moved)) if at >= asked_from else -1)


@pytest.mark.parametrize("group", ["parity", "Z7", "S3", "A5"])
def test_sequences_follow_the_definition(group: str) -> None:
    task = _task(group, length=13, held_out_length=17, examples=8)
    assert task.vocab == GROUPS[group]
    for batch, asked_from in [(next(task.train_batches(0)), 0), (next(task.held_out("test")), 13)]:
        for inputs_T, targets_T in zip(batch.inputs_BT.tolist(), batch.targets_BT.tolist(), strict=True):
            _check_row(inputs_T, targets_T, task, asked_from=asked_from)


def test_everything_is_asked_where_held_out_sequences_are_no_longer() -> None:
    task = _task(length=7, held_out_length=7)
    assert all(bool((batch.targets_BT >= 0).all()) for batch in task.held_out("selection"))


def _beginnings(batch: Batch) -> set[tuple[int, ...]]:
    return {tuple(row[:10]) for row in batch.inputs_BT.tolist()}


def test_splits_are_disjoint_where_sequences_repeat() -> None:
    # Parity of 10 bits: each of the 1,024 beginnings is met many times, so a leak would show.
    task = _task("parity", length=10, held_out_length=12, examples=1000)
    train: set[tuple[int, ...]] = set().union(*map(_beginnings, itertools.islice(task.train_batches(0), 100)))
    selection = set().union(*map(_beginnings, task.held_out("selection")))
    test = set().union(*map(_beginnings, task.held_out("test")))
    assert len(train | selection | test) > 1000
    assert min(len(selection), len(test)) > 100
    assert not train & selection
    assert not train & test
    assert not selection & test


def test_held_out_splits_have_the_asked_size_and_stay_the_same() -> None:
    first, again = ([batch.inputs_BT for batch in _task().held_out("selection")] for _ in range(2))
    assert sum(map(len, first)) == 300
    assert all(part.shape[1] == 13 for part in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_same_seed_same_data_other_seed_other_data() -> None:
    one, same, other = (next(_task().train_batches(seed)).inputs_BT for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group": "S6"}, "group 'S6' is none that can be tracked; write parity, Z2"),
        ({"group": "s5"}, "group 's5'"),
        ({"group": "A2"}, "group 'A2'"),
        ({"length": 0}, "length 0 is not between 1"),
        ({"held_out_length": 6}, "held_out_length 6 is not between 7, the length of a training sequence"),
        ({"examples": 0}, "examples 0"),
        ({"group": "parity"}, "128 different sequences, too few to split; 1000"),
    ],
)
def test_what_cannot_be_tracked_is_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _task(**changes)  # type: ignore[arg-type]


class _Oracle(torch.nn.Module):
    """Says the product as far as it was trained, and the identity from there on."""

    def __init__(self, vocab: int, until: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.vocab = vocab
        self.until = until

    def answer(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        is_known_T = torch.arange(targets_BT.shape[1]) < self.until
        said_BT = torch.where(is_known_T, targets_BT, 0)
        asked_BT = targets_BT >= 0
        return torch.nn.functional.one_hot(said_BT[asked_BT], self.vocab).float(), targets_BT[asked_BT]


@pytest.mark.parametrize(("until", "low", "high"), [(7, 0.1, 0.24), (10, 0.5, 0.65), (13, 1.0, 1.0)])
def test_score_is_of_what_lies_past_the_training_length(until: int, low: float, high: float) -> None:
    score = _task(examples=512).score(_Oracle(6, until), "test", Deadline(60))  # type: ignore[arg-type]
    assert low <= score <= high
