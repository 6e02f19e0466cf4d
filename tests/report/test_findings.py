"""Roles, fronts and hypervolumes that a report draws, from trials made up and from a database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mixforge.db.results import open as open_results
from mixforge.db.store import Store
from mixforge.db.values import Proposal, describe
from mixforge.evaluator.evaluation import (
    FIGURES,
    Curve,
    Environment,
    Evaluation,
    Outcome,
    Profile,
    Timing,
    Workload,
)
from mixforge.report.findings import gather
from mixforge.report.page import page
from mixforge.search_space.notation import parse

if TYPE_CHECKING:
    from tests.report.conftest import MadeUp

OBJECTIVES = ("bits_per_byte", "recall", "decode_ms")


def test_front_is_what_nothing_beats(made_up: Callable[[int], MadeUp]) -> None:
    found = made_up(80).findings()

    def beats(one: dict[str, float], other: dict[str, float]) -> bool:
        signs = {name: 1 if FIGURES[name].better == "lower" else -1 for name in OBJECTIVES}
        gains = [signs[name] * (other[name] - one[name]) for name in OBJECTIVES]
        return min(gains) >= 0 and max(gains) > 0

    for each in found.candidates:
        beaten = any(beats(dict(other.trial.figures), dict(each.trial.figures)) for other in found.candidates)
        assert each.on_front is not beaten
    bits = [each.trial.figures["bits_per_byte"] for each in found.front]
    assert bits == sorted(bits)


def test_arms_and_names(made_up: Callable[[int], MadeUp]) -> None:
    made = made_up(60)
    found = made.findings()
    assert {each.name for each in found.baselines} == set(made.names.values())
    assert all((each.name is None) == (each.arm != "baseline") for each in found.candidates)
    assert {growth.arm: len(growth.volumes) for growth in found.growth} == {
        arm: sum(trial.origin == origin for trial in made.trials)
        for arm, origin in (("search", "tpe"), ("random", "random"))
    }
    for growth in found.growth:
        assert all(one <= other for one, other in combinations(growth.volumes, 2))


def test_an_architecture_that_was_tried_twice_is_one_candidate(made_up: Callable[[int], MadeUp]) -> None:
    made = made_up(40)
    again = replace(made.trials[0], id=100, number=100, origin="tpe", reused=True)
    found = replace(made, trials=(*made.trials, again)).findings()
    (one,) = (each for each in found.candidates if each.trial.digest == again.digest)
    assert one.arm == "baseline"
    assert one.trial.number == 0


def test_a_trial_without_all_objectives_is_no_candidate(made_up: Callable[[int], MadeUp]) -> None:
    made = made_up(40)
    ok = next(trial for trial in made.trials if trial.outcome is Outcome.ok)
    partial = replace(ok, figures={"bits_per_byte": 0.001})
    found = replace(made, trials=tuple(partial if t is ok else t for t in made.trials)).findings()
    assert ok.digest not in {each.trial.digest for each in found.candidates}


def test_nothing_measured_is_said(made_up: Callable[[int], MadeUp]) -> None:
    made = made_up(20)
    with pytest.raises(ValueError, match=r"no trial yet with figures for bits_per_byte"):
        replace(made, trials=()).findings()


PLACE = Environment(
    device="CPU", device_kind="cpu", device_count=2, driver=None, clock_mhz=None, threads=1, python="3.11",
    torch="2.13", triton=None, mixforge="0.1.0", commit=None, host="h", system="Linux",
)  # fmt: skip


FILE = """
objectives = ["bits_per_byte", "recall", "decode_ms"]
baselines = ["transformer", "lm(attn, width=64)"]
"""


def test_gather_reads_a_database(tmp_path: Path) -> None:
    texts = {
        "baseline": "lm(attn + swiglu, width=64)",
        "random": "lm(gdn + mlp, width=64)",
        "tpe": "lm(conv, width=64)",
    }
    with Store.open(tmp_path / "runs.db", "create") as store:
        campaign = store.add_campaign("small", "d" * 64, FILE, 0)
        for number, (origin, text) in enumerate(texts.items()):
            architecture = parse(text)
            proposal = Proposal(
                number=number, architecture=describe(architecture), budget="b" * 64, origin=origin
            )
            trial = store.propose(campaign, proposal)
            cost = architecture.cost(512)
            curve = Curve(task="text", steps=(0, 10), loss=(5.5, 2.0 + number))
            evaluation = Evaluation(
                outcome=Outcome.ok, context=512, params=cost.params, flops=cost.flops, state_bytes=cost.state_bytes,
                decode_bytes=cost.decode_bytes, bits_per_byte=3.0 - number / 4, recall=0.5, backend="torch", seed=0,
                environment=PLACE, curves=(curve,),
            )  # fmt: skip
            timing = Timing(phase="decode", raw_ms=(1.0 + number, 1.2 + number, 1.1 + number))
            profile = Profile(
                outcome=Outcome.ok, workload=Workload(), timings=(timing,), backend="torch", environment=PLACE
            )
            store.record_evaluation(store.claim(trial, "train", "w"), evaluation, seconds=1.0)
            store.record_profile(store.claim(trial, "profile", "w"), profile, seconds=1.0)
    with open_results(tmp_path / "runs.db") as results:
        found = gather(results, "small")
        with pytest.raises(ValueError, match="no campaign"):
            gather(results, "other")
    assert [each.arm for each in found.candidates] == ["baseline", "random", "search"]
    assert [each.name for each in found.candidates] == ["transformer", None, None]
    assert found.objectives == OBJECTIVES
    assert found.environment == PLACE
    assert set(found.evaluations) == {each.trial.digest for each in found.front}
    assert "transformer" in page(found)
