"""The certificate of mqar: what is stored holds, and a small case really does."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

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


def test_a_fixed_state_falls_as_pairs_outgrow_it() -> None:
    cases = read_cases()
    small = sorted(
        (case for case in cases if "retnet(heads=16)" in case.architecture), key=lambda case: case.pairs
    )
    assert [case.pairs for case in small] == [3, 6, 10, 14]
    # The last that is recalled, half recalled, forgotten; attention is there to the end, and a larger state longer.
    assert min(small[1].recall) >= 0.95 > 0.7 > max(small[2].recall) > 0.2 > max(small[3].recall)
    assert any("attn" in case.architecture and case.task == small[3].task for case in cases)
    assert any("retnet(heads=2)" in case.architecture and case.task == small[2].task for case in cases)


def test_every_case_is_within_the_laptop_budget() -> None:
    laptop = tomllib.loads((Path(__file__).parents[2] / "examples" / "laptop.toml").read_text())
    steps, rate = Mqar().training.steps, Mqar().training.lr
    assert set(laptop["tasks"]["mqar"]) <= {"vocab", "length", "pairs"}
    assert all(case.steps <= steps and (case.lr,) == rate for case in read_cases())


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
