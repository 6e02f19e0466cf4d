"""Multi-query associative recall: its data and its score."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.task import Batch
from mixforge.evaluator.tasks.mqar import Mqar


def _task(vocab: int = 32, length: int = 40, pairs: int = 6, examples: int = 300, rewrites: int = 0) -> Mqar:
    training = Recipe(steps=1, batch=64, lr=(1e-3,))
    return Mqar(
        vocab=vocab, length=length, pairs=pairs, rewrites=rewrites, examples=examples, training=training
    )


def _check_row(inputs_T: list[int], targets_T: list[int], task: Mqar) -> None:
    """The definition, in plain Python: pairs first, then each key once with its last value as the target."""
    half, pairs, writes = task.vocab // 2, task.pairs, task.pairs + task.rewrites
    written, values = inputs_T[0 : 2 * writes : 2], inputs_T[1 : 2 * writes : 2]
    keys = written[:pairs]
    assert len(set(keys)) == pairs
    assert len(set(values)) == writes
    assert len(set(written[pairs:])) == task.rewrites
    assert set(written) == set(keys)
    assert all(1 <= key < half for key in keys)
    assert all(half <= value < task.vocab for value in values)
    assert all(target == -1 for target in targets_T[: 2 * writes])
    answers = dict(zip(written, values, strict=True))
    asked = []
    for at in range(2 * writes, task.length):
        if targets_T[at] == -1:
            assert inputs_T[at] == 0
        else:
            assert at % 2 == 0
            assert targets_T[at] == answers[inputs_T[at]]
            asked.append(inputs_T[at])
    assert sorted(asked) == sorted(keys)


@pytest.mark.parametrize("rewrites", [0, 1, 6])
def test_sequences_follow_the_definition(rewrites: int) -> None:
    task = _task(rewrites=rewrites)
    batches = [next(task.train_batches(0)), *task.held_out("selection"), *task.held_out("test")]
    for batch in batches:
        assert batch.inputs_BT.shape == batch.targets_BT.shape
        for inputs_T, targets_T in zip(batch.inputs_BT.tolist(), batch.targets_BT.tolist(), strict=True):
            _check_row(inputs_T, targets_T, task)


@pytest.mark.parametrize(("vocab", "length", "pairs"), [(12, 82, 1), (13, 83, 1), (32, 60, 15), (33, 63, 13)])
def test_smallest_and_odd_settings(vocab: int, length: int, pairs: int) -> None:
    task = _task(vocab, length, pairs, examples=5)
    for batch in task.held_out("test"):
        for inputs_T, targets_T in zip(batch.inputs_BT.tolist(), batch.targets_BT.tolist(), strict=True):
            _check_row(inputs_T, targets_T, task)


def _rows(batch: Batch) -> set[tuple[int, ...]]:
    return {tuple(row) for row in batch.inputs_BT.tolist()}


def test_splits_are_disjoint_where_sequences_repeat() -> None:
    # 5 keys x 6 values x 40 slots: nearly every sequence is met, most of them many times, so a leak would show.
    task = _task(vocab=12, length=82, pairs=1, examples=1000)
    train: set[tuple[int, ...]] = set().union(*map(_rows, itertools.islice(task.train_batches(0), 100)))
    selection = set().union(*map(_rows, task.held_out("selection")))
    test = set().union(*map(_rows, task.held_out("test")))
    assert len(train | selection | test) > 900
    assert min(len(selection), len(test)) > 100
    assert not train & selection
    assert not train & test
    assert not selection & test


def test_too_few_sequences_to_split_are_refused() -> None:
    with pytest.raises(ValueError, match="24 different sequences"):
        _task(vocab=8, length=6, pairs=1)


def test_rewrites_are_bounded_by_keys_and_values() -> None:
    with pytest.raises(ValueError, match="rewrites 7 is not between 0 and 6"):
        _task(rewrites=7)
    with pytest.raises(
        ValueError, match=r"rewrites 4 is not between 0 and 3.*a vocabulary of 18 has 9 values"
    ):
        _task(vocab=18, rewrites=4)
    with pytest.raises(ValueError, match="6 pairs, 4 rewrites and their questions take 32 tokens"):
        _task(length=31, rewrites=4)


def test_settings_without_rewrites_are_those_from_before_there_were_any() -> None:
    assert "rewrites" not in _task().identity()
    assert _task(rewrites=2).identity()["rewrites"] == 2


def test_held_out_splits_have_the_asked_size_and_stay_the_same() -> None:
    task = _task(examples=300)
    first = [batch.inputs_BT for batch in task.held_out("selection")]
    again = [batch.inputs_BT for batch in task.held_out("selection")]
    assert sum(map(len, first)) == 300
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_same_seed_same_data_other_seed_other_data() -> None:
    task = _task()
    one, same, other = (next(task.train_batches(seed)).inputs_BT for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_questions_come_early_as_the_power_law_says() -> None:
    task = _task(length=108, pairs=6, examples=1000)
    asked = torch.cat([batch.targets_BT for batch in task.held_out("test")]) >= 0
    share = asked[:, 12::2].double().mean(0)
    # A first draw takes slot 1 with probability 1 / sum(i^-0.99); six draws without replacement keep the order.
    assert share[0] > share[1] > share[4] > share[20]
    assert float(share.sum()) == pytest.approx(6)


class _Oracle(torch.nn.Module):
    """Answers by looking the key up, and only some of the time."""

    def __init__(self, vocab: int, right: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.vocab = vocab
        self.right = right

    def answer(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        targets_N = targets_BT[targets_BT >= 0]
        wrong_N = torch.arange(len(targets_N)) >= self.right * len(targets_N)
        return torch.nn.functional.one_hot((targets_N + wrong_N) % self.vocab, self.vocab).float(), targets_N


@pytest.mark.parametrize("right", [0.0, 0.25, 1.0])
def test_score_is_the_fraction_answered(right: float) -> None:
    from mixforge.evaluator.deadline import Deadline

    score = _task(examples=256).score(_Oracle(32, right), "test", Deadline(60))  # type: ignore[arg-type]
    assert score == pytest.approx(right, abs=1e-3)
