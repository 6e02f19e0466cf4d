"""Copying: its data and its score."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.task import Batch
from mixforge.evaluator.tasks.copy import Copy


def _task(vocab: int = 9, length: int = 13, shortest: int = 5, examples: int = 300) -> Copy:
    training = Recipe(steps=1, batch=64, lr=(1e-3,))
    return Copy(vocab=vocab, length=length, shortest=shortest, examples=examples, training=training)


def _check_row(inputs_T: list[int], targets_T: list[int], task: Copy) -> int:
    """The definition, in plain Python. Returns how many symbols the string has."""
    assert len(inputs_T) == len(targets_T) == 2 * task.length + 1
    mark = inputs_T.index(1)
    string = inputs_T[1:mark]
    size = len(string)
    assert all(2 <= symbol < task.vocab for symbol in string)
    said = [0, *string, 1, *string[:-1]]
    assert inputs_T == said + [0] * (len(inputs_T) - len(said))
    assert targets_T[:mark] == [-1] * mark
    assert targets_T[mark : mark + size] == string
    assert targets_T[mark + size :] == [-1] * (len(targets_T) - mark - size)
    return size


def _sizes(batch: Batch, task: Copy) -> set[int]:
    rows = zip(batch.inputs_BT.tolist(), batch.targets_BT.tolist(), strict=True)
    return {_check_row(inputs_T, targets_T, task) for inputs_T, targets_T in rows}


def test_strings_follow_the_definition() -> None:
    task = _task()
    sizes = set().union(*(_sizes(batch, task) for batch in itertools.islice(task.train_batches(0), 4)))
    assert sizes == set(range(5, 14))
    for split in ("selection", "test"):
        assert all(_sizes(batch, task) == {13} for batch in task.held_out(split))


@pytest.mark.parametrize(("vocab", "length", "shortest"), [(1002, 1, 1), (4, 10, 1), (5, 63, 63)])
def test_smallest_and_odd_settings(vocab: int, length: int, shortest: int) -> None:
    task = _task(vocab, length, shortest, examples=5)
    assert _sizes(next(task.train_batches(1)), task) <= set(range(shortest, length + 1))
    assert all(_sizes(batch, task) == {length} for batch in task.held_out("test"))


def _rows(batch: Batch) -> set[tuple[int, ...]]:
    return {tuple(row) for row in batch.inputs_BT.tolist()}


def test_splits_are_disjoint_where_strings_repeat() -> None:
    # 2 symbols, 10 of them: each of the 1,024 strings is met many times, so a leak would show.
    task = _task(vocab=4, length=10, shortest=10, examples=1000)
    train: set[tuple[int, ...]] = set().union(*map(_rows, itertools.islice(task.train_batches(0), 100)))
    selection = set().union(*map(_rows, task.held_out("selection")))
    test = set().union(*map(_rows, task.held_out("test")))
    assert len(train | selection | test) > 1000
    assert min(len(selection), len(test)) > 100
    assert not train & selection
    assert not train & test
    assert not selection & test


def test_held_out_splits_have_the_asked_size_and_stay_the_same() -> None:
    first, again = ([batch.inputs_BT for batch in _task().held_out("selection")] for _ in range(2))
    assert sum(map(len, first)) == 300
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_same_seed_same_data_other_seed_other_data() -> None:
    one, same, other = (next(_task().train_batches(seed)).inputs_BT for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab": 3}, "vocab 3 is not between 4"),
        ({"length": 0}, "length 0 is not between 1"),
        ({"shortest": 14}, "shortest 14 is not between 1 and 13, the length"),
        ({"shortest": 0}, "shortest 0"),
        ({"examples": 0}, "examples 0"),
        ({"vocab": 4, "length": 9}, "512 different strings, too few to split; 1000"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _task(**changes)


class _Oracle(torch.nn.Module):
    """Says the symbol that it is asked for at every second position, and the next symbol elsewhere."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.vocab = vocab

    def answer(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        targets_N = targets_BT[targets_BT >= 0]
        wrong_N = torch.arange(len(targets_N)) % 2
        return torch.nn.functional.one_hot((targets_N + wrong_N) % self.vocab, self.vocab).float(), targets_N


def test_score_is_the_fraction_of_symbols() -> None:
    task = _task(length=12, examples=64)
    assert task.score(_Oracle(9), "test", Deadline(60)) == pytest.approx(0.5)  # type: ignore[arg-type]
