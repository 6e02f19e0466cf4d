"""What `status` and `show` need."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixforge.db.summary import dossier, find, status
from mixforge.db.values import State
from mixforge.evaluator.evaluation import Outcome


def test_status_counts_everything_once(store, campaign, samples):
    first = samples.finish(store, campaign, 0, 2.5, 0.5)
    second = samples.finish(store, campaign, 1, 2.0, 1.0)
    for number, n in ((2, 0), (3, 3), (4, 4), (5, 5)):
        store.propose(campaign, samples.proposal(number, n=n, origin="baseline"))
    store.answer(3, environment=samples.environment)
    lost = store.claim(4, "train", "w")
    store.claim(4, "train", "w")
    crashed = store.claim(5, "train", "w")
    store.record_failure(crashed, Outcome.crashed, "died", seconds=4.0, last=True)
    store.spend(store.begin_run(campaign, "host:1"), 33.0)
    found = status(store, store.campaign("laptop"))
    assert {
        (count.origin, count.state, count.outcome): (count.trials, count.reused) for count in found.counts
    } == {
        ("random", State.finished, Outcome.ok): (2, 0),
        ("baseline", State.finished, Outcome.ok): (1, 1),
        ("baseline", State.training, None): (1, 0),
        ("baseline", State.finished, Outcome.crashed): (1, 0),
        ("baseline", State.proposed, None): (1, 0),
    }
    assert (found.trials(), found.trials(state=State.finished), found.trials(outcome=Outcome.ok)) == (6, 4, 3)
    assert (found.spent_s, found.train_s, found.profile_s) == (33.0, 6.0, 1.0)
    assert (found.open_attempts, found.lost_attempts) == (1, 1)
    assert found.rejected == {"too large": 0 + 1 + 2 + 0 + 1 + 2}
    best = {each.figure: each for each in found.best}
    assert (best["bits_per_byte"].value, best["bits_per_byte"].digest) == (2.0, second.digest)
    assert (best["decode_ms"].number, best["decode_ms"].digest) == (0, first.digest)
    assert best["recall"].value == 0.25
    assert lost not in [attempt.token for attempt in store.attempts(campaign) if attempt.ended_at is None]


def test_status_of_an_empty_campaign(store, campaign):
    found = status(store, store.campaign("laptop"))
    assert (found.counts, found.best, found.spent_s, found.trials()) == ((), (), 0.0, 0)


def test_dossier_holds_everything(store, campaign, samples):
    trial = samples.finish(store, campaign, 0, 2.5, 0.5)
    samples.finish(store, campaign, 1, 2.0, 1.0)
    architecture = samples.architecture(0)
    later = samples.profile(0.6, backend="reference")
    store.add_profile(architecture, later)
    found = dossier(store, find(store, trial.digest[:10].upper()))
    assert found.architecture == architecture
    assert found.evaluations == ((trial.budget, samples.evaluation(2.5)),)
    assert found.profiles == (samples.profile(0.5), later)
    assert found.trials == (("laptop", trial),)
    assert [(attempt.stage, attempt.outcome) for attempt in found.attempts] == [
        ("train", Outcome.ok),
        ("profile", Outcome.ok),
    ]


def test_prefix_names_one_architecture(store, campaign, samples):
    digests = ["abcd" + "0" * 60, "abcd" + "1" * 60, "abce" + "0" * 60]
    for number, digest in enumerate(digests):
        architecture = replace(samples.architecture(number), digest=digest)
        store.propose(campaign, samples.proposal(number, architecture=architecture))
    assert find(store, "abcd1").digest == digests[1]
    assert find(store, digests[2]).digest == digests[2]
    with pytest.raises(ValueError, match="abcd begins more than one") as raised:
        find(store, "abcd")
    assert str(raised.value).count("lm(") == 2
    with pytest.raises(ValueError, match=r"begins with ffff.*mixforge query"):
        find(store, "ffff")
    for wrong in ("abc", "xyzw", "", "%%%%", "f" * 65, "____"):
        with pytest.raises(ValueError, match="is not a digest"):
            find(store, wrong)
