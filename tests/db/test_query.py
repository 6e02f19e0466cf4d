"""Tables and fronts of what is stored, against the same computed from its trials."""

from __future__ import annotations

import random

import pytest

from mixforge.db.query import ask, front
from mixforge.evaluator.evaluation import Outcome


@pytest.fixture
def many(store, campaign, samples):
    rng = random.Random(1)
    for number in range(24):
        # Few values, so that there are ties.
        samples.finish(store, campaign, number, rng.choice([1.8, 2.0, 2.2]), rng.choice([0.5, 1.0, 2.0, 4.0]))
    failed = store.propose(campaign, samples.proposal(24))
    token = store.claim(failed, "train", "w")
    store.record_failure(token, Outcome.crashed, "died", seconds=1.0, last=True)
    store.propose(campaign, samples.proposal(25))
    return store


def test_order_columns_and_limit(many, campaign):
    trials = many.trials(campaign)
    answer = ask(many, order="-decode_ms", columns=("number", "decode_ms"), limit=5)
    assert answer.columns == ("number", "decode_ms")
    slowest = sorted(trials, key=lambda trial: (-trial.figures.get("decode_ms", 0), trial.number))
    assert [row[0] for row in answer.rows] == [trial.number for trial in slowest[:5]]
    assert [row[0] for row in ask(many, order="decode_ms", columns=("number",)).rows][-2:] == [24, 25]
    assert len(ask(many).rows) == 26
    assert ask(many, limit=0).rows == ()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"order": "speed"}, "no column 'speed'"),
        ({"columns": ("digest", "decod_ms")}, "did you mean decode_ms"),
        ({"columns": ()}, "at least one"),
        ({"limit": -1}, "limit -1"),
        ({"where": "x ="}, "no column 'x'"),
    ],
)
def test_wrong_request(many, request_, message):
    with pytest.raises(ValueError, match=message):
        ask(many, **request_)


def test_front_is_what_nothing_beats(many, campaign):
    ok = [trial for trial in many.trials(campaign) if trial.outcome is Outcome.ok]
    figures = ("bits_per_byte", "decode_ms")

    def beats(a, b):
        pairs = [(a.figures[name], b.figures[name]) for name in figures]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    expected = [trial for trial in ok if not any(beats(other, trial) for other in ok)]
    found = front(many, figures)
    assert sorted(found, key=lambda trial: trial.number) == expected
    assert [trial.figures["bits_per_byte"] for trial in found] == sorted(
        trial.figures["bits_per_byte"] for trial in found
    )


def test_front_under_a_condition(many, campaign):
    (best,) = front(many, ("decode_ms",), where="bits_per_byte > 2.1 and number > 5")[:1]
    assert best.figures["bits_per_byte"] == 2.2
    assert best.number > 5
    assert front(many, ("decode_ms",), campaign="another") == ()
    assert front(many, ("recall",))[0].figures["recall"] == 0.25


def test_front_names_an_architecture_once(many, campaign, samples):
    best = front(many, ("bits_per_byte", "decode_ms"))
    again = many.propose(campaign, samples.proposal(50, n=best[0].number))
    many.answer(again, environment=samples.environment)
    assert front(many, ("bits_per_byte", "decode_ms")) == best


def test_front_of_unknown_figure(many):
    with pytest.raises(ValueError, match="'speed' is not a figure"):
        front(many, ("speed",))
    with pytest.raises(ValueError, match="at least one"):
        front(many, ())
