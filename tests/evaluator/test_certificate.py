"""The certificate of mqar: what is stored holds, and a small case really does."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from mixforge.evaluator.budget import Budget
from mixforge.evaluator.certificate import PATH, SEEDS, Case, certificate_text, measure, read_cases
from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluate import evaluate
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.tables import read_record
from mixforge.evaluator.tasks.mqar import Mqar
from mixforge.search_space.notation import parse


def test_stored_cases_hold_and_say_what_the_task_must_tell_apart() -> None:
    cases = read_cases()
    assert all(case.holds and len(case.recall) == len(SEEDS) for case in cases)
    attention = [case for case in cases if "attn" in case.architecture]
    assert attention
    assert all(case.at_least >= 0.95 for case in attention)
    convolution = [case for case in cases if "conv" in case.architecture]
    assert convolution
    assert all(case.at_most <= 0.2 for case in convolution)


def test_a_small_state_falls_where_a_large_one_trained_as_long_does_not() -> None:
    cases = read_cases()
    few, more, many, longer = (case for case in cases if "deltanet(heads=4)" in case.architecture)
    (large,) = (case for case in cases if "deltanet(heads=1)" in case.architecture)
    assert few.pairs < more.pairs < many.pairs == longer.pairs == large.pairs
    assert min(few.recall) > max(more.recall) >= min(more.recall) > max(many.recall)
    assert many.task == large.task
    assert any(case.task == many.task and "attn" in case.architecture for case in cases)
    # Slow learning is not what is seen: twice the steps leave it far behind.
    assert longer.steps == 2 * large.steps
    assert max(longer.recall) < min(large.recall) - 0.3


def test_text_round_trips() -> None:
    cases = read_cases()
    tables = tomllib.loads(certificate_text(cases, environment()))["case"]
    assert tuple(read_record(Case, table, "case") for table in tables) == cases
    assert PATH.read_text().startswith("#")


@pytest.mark.parametrize(("mixer", "low", "high"), [("attn", 0.95, 1.0), ("conv", 0.0, 0.2)])
def test_attention_recalls_and_convolutions_do_not(mixer: str, low: float, high: float) -> None:
    """A smaller case than the stored ones, really trained: one layer of width 32, 80 steps."""
    training = Recipe(steps=80, batch=32, lr=(6e-3,))
    task = Mqar(vocab=16, length=16, pairs=4, examples=128, training=training)
    recall = evaluate(parse(f"lm({mixer} + mlp, width=32)"), Budget(tasks=(task,))).recall
    assert recall is not None
    assert low <= recall <= high


def test_measuring_fills_in_a_case() -> None:
    case = dataclasses.replace(
        read_cases()[0], architecture="lm(mlp + attn, width=8)", vocab=16, length=8, pairs=2
    )
    measured = measure(dataclasses.replace(case, recall=()), seeds=(0,))
    assert len(measured.recall) == 1
    assert measured.train_s > 0
