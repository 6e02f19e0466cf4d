"""The store's contract: tokens, states, and values that come back as they went in."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mixforge.db.connection import StoreError
from mixforge.db.store import StaleToken, Store
from mixforge.db.values import State
from mixforge.evaluator.evaluation import Curve, Outcome


def test_campaign_goes_on_under_its_name(store, campaign):
    assert store.add_campaign("laptop", "d" * 64, "ignored", 9) == campaign
    assert store.campaign("laptop").text == "[campaign]\nname = 'laptop'\n"
    with pytest.raises(ValueError, match=r"another content .*new name"):
        store.add_campaign("laptop", "e" * 64, "", 7)
    with pytest.raises(ValueError, match=r"no campaign 'desktop'.*laptop"):
        store.campaign("desktop")


def test_trial_from_proposed_to_finished(store, campaign, samples):
    proposal = samples.proposal(0, operator="cross", parents=())
    key = store.propose(campaign, proposal)
    trial = store.trial(key)
    assert (trial.state, trial.outcome, trial.figures) == (State.proposed, None, {})
    assert (trial.choices, trial.attributes, trial.rejected) == (
        proposal.choices,
        proposal.attributes,
        proposal.rejected,
    )
    token = store.claim(key, "train", "worker 1")
    assert store.trial(key).state is State.training
    trial = store.record_evaluation(token, samples.evaluation(2.0), seconds=3.0)
    assert (trial.state, trial.outcome) == (State.trained, None)
    assert trial.figures["bits_per_byte"] == 2.0
    assert trial.figures["flops"] == 2**60
    trial = store.record_profile(store.claim(key, "profile", "device"), samples.profile(1.0), seconds=0.5)
    assert (trial.state, trial.outcome, trial.reused) == (State.finished, Outcome.ok, False)
    assert trial.figures["decode_ms"] == pytest.approx(1.1)
    assert trial.spreads == pytest.approx({"prefill_ms": 0.15, "decode_ms": 0.15, "train_ms": 0.15})
    assert trial.finished_at is not None
    assert trial.finished_at >= trial.proposed_at
    assert store.trials(campaign) == (trial,)
    assert [attempt.seconds for attempt in store.attempts(campaign)] == [3.0, 0.5]


def test_trial_that_wants_no_profile_is_finished_by_its_evaluation(store, campaign, samples):
    key = store.propose(campaign, samples.proposal(0))
    trial = store.record_evaluation(
        store.claim(key, "train", "w"), samples.evaluation(2.0), seconds=1.0, last=True
    )
    assert (trial.state, trial.outcome) == (State.finished, Outcome.ok)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.ok])
def test_failed_training_finishes_the_trial(store, campaign, samples, outcome):
    key = store.propose(campaign, samples.proposal(0))
    failed = samples.evaluation(
        None, outcome=outcome, reason="because", trace="Traceback ...", recall=None, bits_per_byte_test=None
    )
    trial = store.record_evaluation(store.claim(key, "train", "w"), failed, seconds=1.0)
    assert (trial.state, trial.outcome, trial.reason) == (State.finished, outcome, "because")
    assert store.evaluation(trial.digest, trial.budget) == failed


def test_only_the_newest_token_records(store, campaign, samples):
    key = store.propose(campaign, samples.proposal(0))
    old = store.claim(key, "train", "slow")
    new = store.claim(key, "train", "fast")
    assert new > old
    with pytest.raises(StaleToken, match=f"superseded by attempt {new}"):
        store.record_evaluation(old, samples.evaluation(9.0), seconds=1.0)
    with pytest.raises(StaleToken):
        store.record_failure(old, Outcome.crashed, "died", seconds=1.0, last=True)
    assert store.trial(key).state is State.training
    assert store.record_evaluation(new, samples.evaluation(2.0), seconds=1.0).figures["bits_per_byte"] == 2.0
    first, second = store.attempts(campaign)
    assert (first.outcome, first.reason) == (None, f"superseded by attempt {new}")
    assert (second.outcome, second.reason) == (Outcome.ok, None)


def test_recording_twice_is_refused(store, campaign, samples):
    key = store.propose(campaign, samples.proposal(0))
    token = store.claim(key, "train", "w")
    store.record_evaluation(token, samples.evaluation(2.0), seconds=1.0)
    before = store.trials(campaign), store.attempts(campaign)
    for again in (
        lambda: store.record_evaluation(token, samples.evaluation(1.0), seconds=1.0),
        lambda: store.record_profile(token, samples.profile(), seconds=1.0),
        lambda: store.record_failure(token, Outcome.crashed, "died", seconds=1.0, last=True),
    ):
        with pytest.raises(StaleToken, match="has ended"):
            again()
    assert (store.trials(campaign), store.attempts(campaign)) == before


def test_token_of_one_stage_does_not_record_the_other(store, campaign, samples):
    key = store.propose(campaign, samples.proposal(0))
    with pytest.raises(StaleToken, match="to train trial 0, not to profile"):
        store.record_profile(store.claim(key, "train", "w"), samples.profile(), seconds=1.0)
    with pytest.raises(StaleToken, match="no attempt 999"):
        store.record_profile(999, samples.profile(), seconds=1.0)


def test_finished_trial_cannot_be_claimed(store, campaign, samples):
    key = samples.finish(store, campaign, 0, 2.0, 1.0).id
    for stage in ("train", "profile"):
        with pytest.raises(ValueError, match="finished"):
            store.claim(key, stage, "w")
    with pytest.raises(ValueError, match="no trial with the id 77"):
        store.claim(77, "train", "w")
    waiting = store.propose(campaign, samples.proposal(1))
    with pytest.raises(ValueError, match="trial 1 is proposed; it cannot be claimed to profile"):
        store.claim(waiting, "profile", "w")


def test_failed_attempt_waits_again_or_ends_the_trial(store, campaign, samples):
    key = store.propose(campaign, samples.proposal(0))
    token = store.claim(key, "train", "w")
    assert (
        store.record_failure(token, Outcome.crashed, "died", seconds=1.0, last=False).state is State.proposed
    )
    store.record_evaluation(store.claim(key, "train", "w"), samples.evaluation(2.0), seconds=1.0)
    token = store.claim(key, "profile", "w")
    assert (
        store.record_failure(token, Outcome.timed_out, "hung", seconds=1.0, last=False).state is State.trained
    )
    token = store.claim(key, "profile", "w")
    trial = store.record_failure(token, Outcome.crashed, "died again", "trace", seconds=1.0, last=True)
    assert (trial.state, trial.outcome, trial.reason) == (State.finished, Outcome.crashed, "died again")
    # What training gave stays, but the trial is on no front.
    assert trial.figures["bits_per_byte"] == 2.0
    with pytest.raises(ValueError, match="cannot have the outcome ok"):
        store.record_failure(token, Outcome.ok, "", seconds=1.0, last=True)


def test_trial_is_answered_from_the_store(store, campaign, samples):
    first = samples.finish(store, campaign, 0, 2.0, 1.0)
    again = store.propose(campaign, samples.proposal(1, n=0))
    answered = store.answer(again, environment=samples.environment)
    assert (answered.state, answered.reused, answered.figures) == (State.finished, True, first.figures)
    assert store.answer(again) is None
    elsewhere = store.propose(campaign, samples.proposal(2, n=0))
    other = replace(samples.environment, device="Other CPU")
    assert store.answer(elsewhere, environment=other).state is State.trained
    assert "decode_ms" not in store.trial(elsewhere).figures
    without = store.propose(campaign, samples.proposal(3, n=0))
    assert store.answer(without, last=True).state is State.finished
    other_budget = store.propose(campaign, samples.proposal(4, n=0, budget="c" * 64))
    assert store.answer(other_budget) is None
    assert store.trial(other_budget).state is State.proposed


def test_failed_profile_answers_nothing(store, campaign, samples):
    key = store.propose(campaign, samples.proposal(0))
    store.record_evaluation(store.claim(key, "train", "w"), samples.evaluation(2.0), seconds=1.0)
    failed = samples.profile(1.0, outcome=Outcome.out_of_memory, reason="no memory", timings=())
    trial = store.record_profile(store.claim(key, "profile", "w"), failed, seconds=1.0)
    assert (trial.state, trial.outcome, trial.reason) == (State.finished, Outcome.out_of_memory, "no memory")
    again = store.propose(campaign, samples.proposal(1, n=0))
    assert store.answer(again, environment=samples.environment).state is State.trained


def test_first_of_two_evaluations_of_the_same_stays(store, campaign, samples):
    keys = [store.propose(campaign, samples.proposal(number, n=0)) for number in (0, 1)]
    tokens = [store.claim(key, "train", "w") for key in keys]
    store.record_evaluation(tokens[1], samples.evaluation(2.0), seconds=1.0)
    late = store.record_evaluation(tokens[0], samples.evaluation(3.0), seconds=1.0)
    assert late.figures["bits_per_byte"] == 2.0
    assert store.evaluation(late.digest, late.budget) == samples.evaluation(2.0)


@pytest.mark.parametrize("outcome", [Outcome.timed_out, Outcome.out_of_memory, Outcome.crashed])
def test_what_may_be_the_machines_is_tried_again_by_another_campaign(store, campaign, samples, outcome):
    failed = samples.evaluation(None, outcome=outcome, reason="the machine was busy")
    first = store.propose(campaign, samples.proposal(0))
    first_token = store.claim(first, "train", "w")
    store.record_evaluation(first_token, failed, seconds=1.0)
    same = store.propose(campaign, samples.proposal(1, n=0))
    assert store.answer(same).outcome is outcome
    later = store.add_campaign("later", "e" * 64, "", 0)
    again = store.propose(later, samples.proposal(0))
    assert store.answer(again) is None
    trial = store.record_evaluation(store.claim(again, "train", "w"), samples.evaluation(2.0), seconds=1.0)
    assert (trial.state, trial.figures["bits_per_byte"]) == (State.trained, 2.0)
    assert store.evaluation(trial.digest, trial.budget) == samples.evaluation(2.0)
    # What the first campaign saw is still there.
    assert store.trial(first).outcome is outcome
    assert store.attempts(campaign)[0].outcome is outcome
    third = store.propose(store.add_campaign("third", "f" * 64, "", 0), samples.proposal(0))
    assert store.answer(third).state is State.trained


@pytest.mark.parametrize("outcome", [Outcome.diverged, Outcome.failed_to_compile, Outcome.illegal])
def test_what_follows_from_the_architecture_answers_every_campaign(store, campaign, samples, outcome):
    failed = samples.evaluation(None, outcome=outcome, reason="it is so")
    key = store.propose(campaign, samples.proposal(0))
    store.record_evaluation(store.claim(key, "train", "w"), failed, seconds=1.0)
    later = store.propose(store.add_campaign("later", "e" * 64, "", 0), samples.proposal(0))
    assert store.answer(later).outcome is outcome


def test_abandoned_attempts_wait_again(store, campaign, samples):
    samples.finish(store, campaign, 0, 2.0, 1.0)
    keys = [store.propose(campaign, samples.proposal(number)) for number in (1, 2, 3)]
    store.record_evaluation(store.claim(keys[1], "train", "w"), samples.evaluation(), seconds=1.0)
    tokens = [store.claim(keys[0], "train", "w"), store.claim(keys[1], "profile", "w")]
    before = store.trial(1)
    assert store.abandon_open_attempts(campaign) == 2
    assert [trial.state for trial in store.trials(campaign)] == [
        State.finished,
        State.proposed,
        State.trained,
        State.proposed,
    ]
    assert store.trial(1) == before
    with pytest.raises(StaleToken, match="abandoned: its driver stopped"):
        store.record_evaluation(tokens[0], samples.evaluation(), seconds=1.0)
    assert store.abandon_open_attempts(campaign) == 0


def test_number_is_taken_once(store, campaign, samples):
    store.propose(campaign, samples.proposal(0))
    with pytest.raises(StoreError, match="another run of this campaign"):
        store.propose(campaign, samples.proposal(0, n=5))
    other = store.add_campaign("other", "e" * 64, "", 1)
    store.propose(other, samples.proposal(0))
    assert [trial.number for trial in store.trials(campaign)] == [0]


def test_lineage_is_kept(store, campaign, samples):
    mother, father = (store.propose(campaign, samples.proposal(number)) for number in (0, 1))
    parents = (store.trial(mother).digest, store.trial(father).digest)
    child = store.propose(campaign, samples.proposal(2, parents=parents, operator="cross"))
    assert (store.trial(child).parents, store.trial(child).operator) == (parents, "cross")
    with pytest.raises(StoreError, match="a parent is unknown"):
        store.propose(campaign, samples.proposal(3, parents=("f" * 64,)))


def test_values_come_back_equal(store, campaign, samples):
    losses = (math.inf, -math.inf, 1e-300, 0.1)
    curve = Curve(task="mqar", steps=(1, 2, 3, 4), loss=losses)
    evaluation = samples.evaluation(1.0 / 3.0, curves=(curve,), weights="abc.safetensors")
    key = store.propose(campaign, samples.proposal(0))
    trial = store.record_evaluation(store.claim(key, "train", "w"), evaluation, seconds=1.0)
    assert store.evaluation(trial.digest, trial.budget) == evaluation
    assert store.evaluation(trial.digest, "c" * 64) is None
    nan = replace(curve, loss=(math.nan,), steps=(1,))
    key = store.propose(campaign, samples.proposal(1))
    diverged = samples.evaluation(math.nan, outcome=Outcome.diverged, reason="loss is nan", curves=(nan,))
    trial = store.record_evaluation(store.claim(key, "train", "w"), diverged, seconds=1.0)
    stored = store.evaluation(trial.digest, trial.budget)
    assert stored.bits_per_byte is None
    assert math.isnan(stored.curves[0].loss[0])
    assert "bits_per_byte" not in trial.figures


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ok_figures_are_numbers(store, campaign, samples, value):
    key = store.propose(campaign, samples.proposal(0))
    token = store.claim(key, "train", "w")
    with pytest.raises(ValueError, match=r"bits_per_byte is (nan|inf)"):
        store.record_evaluation(token, samples.evaluation(value), seconds=1.0)
    store.record_evaluation(token, samples.evaluation(2.0), seconds=1.0)
    token = store.claim(key, "profile", "w")
    with pytest.raises(ValueError, match=r"prefill_ms is (nan|inf)"):
        store.record_profile(token, samples.profile(value), seconds=1.0)


def test_attributes_are_replaced(store, campaign, samples):
    key = samples.finish(store, campaign, 0, 2.0, 1.0).id
    store.save_attributes(key, {"NSGAIISampler:generation": 3})
    assert store.trial(key).attributes == {"NSGAIISampler:generation": 3}


def test_hours_are_summed_over_runs(store, campaign):
    for seconds in (10.0, 2.5):
        run = store.begin_run(campaign, "host:123")
        store.spend(run, seconds / 2)
        store.spend(run, seconds, ended=True)
    assert store.spent_s(campaign) == 12.5


def test_profile_outside_a_campaign(store, samples):
    store.add_profile(samples.architecture(5), samples.profile())
    store.add_profile(samples.architecture(5), samples.profile(2.0))


def test_trials_from_a_number_on(store, campaign, samples):
    for number in (2, 0, 1):
        store.propose(campaign, samples.proposal(number))
    assert [trial.number for trial in store.trials(campaign, since=1)] == [1, 2]


def test_store_closes_after_an_error(path):
    with pytest.raises(KeyError), Store.open(path) as store:
        raise KeyError
    with Store.open(path) as store:
        assert store.campaigns() == ()
