"""The certificates: what is stored holds, and a small case really does."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixforge.evaluator import certificate
from mixforge.evaluator.budget import Budget
from mixforge.evaluator.certificate import (
    SEEDS,
    Case,
    certificate_text,
    certified,
    measure,
    path_of,
    read_cases,
    task_of,
)
from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluate import evaluate
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.tables import read_record
from mixforge.evaluator.tasks import TASKS
from mixforge.evaluator.tasks.copy import Copy
from mixforge.evaluator.tasks.mqar import Mqar
from mixforge.evaluator.tasks.state_tracking import StateTracking
from mixforge.search_space.notation import parse


def _cases(task: str, part: str) -> list[Case]:
    """The cases of a task whose architecture has a part."""
    return [case for case in read_cases(task) if part in case.architecture]


def test_every_task_whose_data_is_drawn_has_a_certificate() -> None:
    assert set(certified()) == set(TASKS) - {"text"}


@pytest.mark.parametrize("task", certified())
def test_stored_cases_hold_in_settings_that_the_task_has(task: str) -> None:
    for case in read_cases(task):
        assert case.holds
        assert len(case.scores) == len(SEEDS)
        # A bound on both sides of which something lies, or the claim says nothing.
        assert case.at_least > 0 or case.at_most < 1
        assert task_of(task, case).training == TASKS[task]().training
        parse(case.architecture)


def test_attention_recalls_and_convolutions_do_not() -> None:
    assert _cases("mqar", "attn")
    assert all(case.at_least >= 0.95 for case in _cases("mqar", "attn"))
    assert _cases("mqar", "conv")
    assert all(case.at_most <= 0.2 for case in _cases("mqar", "conv"))


def test_a_fixed_state_falls_as_pairs_outgrow_it() -> None:
    small = sorted(_cases("mqar", "retnet(heads=16)"), key=lambda case: str(case.setting["pairs"]).zfill(2))
    assert [case.setting["pairs"] for case in small] == [3, 6, 10, 14]
    # The last that is recalled, half recalled, forgotten; attention is there to the end, and a larger state longer.
    assert min(small[1].scores) >= 0.95 > 0.7 > max(small[2].scores) > 0.2 > max(small[3].scores)
    assert any(case.setting == small[3].setting for case in _cases("mqar", "attn"))
    assert any(case.setting == small[2].setting for case in _cases("mqar", "retnet(heads=2)"))


def test_every_case_of_recall_is_within_the_laptop_budget() -> None:
    laptop = tomllib.loads((Path(__file__).parents[2] / "examples" / "laptop.toml").read_text())
    assert set(laptop["tasks"]["mqar"]) <= {"vocab", "length", "pairs"}
    assert all(set(case.setting) <= {"vocab", "length", "pairs"} for case in read_cases("mqar"))


def test_a_smaller_state_copies_fewer_symbols_and_attention_the_most() -> None:
    at = {(case.architecture, case.setting["length"]): case.scores for case in read_cases("copy")}
    attention, large, small = (
        f"lm(2 * ({mixer} + mlp), width=32)" for mixer in ("attn", "retnet(heads=1)", "retnet(heads=16)")
    )
    assert min(at[attention, 32]) >= 0.95
    assert min(at[large, 16]) >= 0.95
    assert max(at[small, 16]) < 0.55 < 0.7 < min(at[small, 8])


def test_parity_is_tracked_with_negative_eigenvalues_and_not_without() -> None:
    assert min(min(case.scores) for case in _cases("state_tracking", "beta=2")) >= 0.85
    without = [case for case in read_cases("state_tracking") if "beta=2" not in case.architecture]
    assert {"attn" in case.architecture for case in without} == {True, False}
    assert max(max(case.scores) for case in without) <= 0.6


@pytest.mark.parametrize("task", certified())
def test_text_round_trips(task: str) -> None:
    cases = read_cases(task)
    tables = tomllib.loads(certificate_text(task, cases, environment()))["case"]
    assert tuple(read_record(Case, table, "case") for table in tables) == cases
    assert path_of(task).read_text().startswith(f"# What known architectures reach on {task}.")


@pytest.mark.parametrize(("mixer", "low", "high"), [("attn", 0.95, 1.0), ("conv", 0.0, 0.2)])
def test_a_small_case_of_recall_really_holds(mixer: str, low: float, high: float) -> None:
    """A smaller case than the stored ones, really trained: one layer of width 32, 80 steps."""
    training = Recipe(steps=80, batch=32, lr=(6e-3,))
    task = Mqar(vocab=16, length=16, pairs=4, examples=128, training=training)
    recall = evaluate(parse(f"lm({mixer} + mlp, width=32)"), Budget(tasks=(task,))).recall
    assert recall is not None
    assert low <= recall <= high


def test_a_small_case_of_copying_really_holds() -> None:
    """Smaller than the stored ones, really trained: 6 symbols, one layer of width 32, 90 steps."""
    training = Recipe(steps=90, batch=32, lr=(6e-3,))
    task = Copy(vocab=16, length=6, shortest=6, examples=64, training=training)
    scores = [
        evaluate(parse(f"lm({mixer} + mlp, width=32)"), Budget(tasks=(task,))).copying
        for mixer in ("attn", "conv")
    ]
    assert scores[0] is not None
    assert scores[1] is not None
    assert scores[0] >= 0.9
    assert scores[1] <= 0.3


@pytest.mark.parametrize(("beta", "low", "high"), [(1, 0.0, 0.7), (2, 0.95, 1.0)])
def test_a_small_case_of_parity_really_holds(beta: int, low: float, high: float) -> None:
    """Smaller than the stored ones, really trained: one layer of width 16, 100 steps, twice the length."""
    training = Recipe(steps=100, batch=32, lr=(1e-2,))
    task = StateTracking(length=10, held_out_length=20, examples=64, training=training)
    tracking = evaluate(
        parse(f"lm(deltanet(beta={beta}, conv=none) + mlp, width=16)"), Budget(tasks=(task,))
    ).tracking
    assert tracking is not None
    assert low <= tracking <= high


def test_measuring_fills_in_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two steps may take less than what a time is rounded to.
    clock = SimpleNamespace(process_time=iter((10.0, 13.24)).__next__)
    monkeypatch.setattr(certificate, "time", clock)
    case = Case(
        says="", architecture="lm(mlp + attn, width=8)", setting={"vocab": 16, "length": 8, "pairs": 2}
    )
    task = task_of("mqar", case)
    assert isinstance(task, Mqar)
    short = dataclasses.replace(task, examples=8, training=dataclasses.replace(task.training, steps=2))
    measured = measure(short, case, seeds=(0,))
    assert len(measured.scores) == 1
    assert measured.train_s == 3.2
