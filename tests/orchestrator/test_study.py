"""Proposals: legal, within limits, never twice, the random arm's in their places, and the same after a
restart.
"""

from __future__ import annotations

import pytest

from mixforge.db.values import State
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.ledger import Ledger
from mixforge.orchestrator.study import Study


def finish(ledger, store, stub, upto):
    """Propose and answer trials without a loop until there are so many."""
    from mixforge.orchestrator.workers import Ended, Job

    while len(ledger.trials) < upto and ledger.propose():
        trial = ledger.next_to_train()
        for stage in ("train", "profile"):
            if trial is None or trial.state is State.finished:
                trial = ledger.next_to_profile() if stage == "profile" else trial
                if trial is None:
                    continue
            trial = ledger.trials[trial.number]
            if stage == "profile":
                ledger.next_to_profile()
            token = ledger.claim(trial, stage, "test")
            job = Job(
                token=token,
                stage=stage,
                architecture=ledger.architecture(trial.number),
                budget=ledger._campaign.budget,
            )
            ledger.record(trial.number, Ended(slot=0, job=job, result=stub.answer(job), seconds=0.1))


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_proposals_are_new_legal_and_within_limits(stub, store, sampler):
    campaign = Campaign.parse(stub.CAMPAIGN.replace('"nsga2"', f'"{sampler}"'))
    ledger = Ledger(campaign, store, stub._environment())
    finish(ledger, store, stub, 22)
    trials = ledger.trials
    assert len({trial.digest for trial in trials}) == 22
    assert all(ledger.architecture(trial.number).cost(1).params <= 40_000 for trial in trials[2:])
    assert all(ledger.architecture(trial.number).why_illegal() is None for trial in trials)
    assert ledger.rejected["limit: params <= 40000"] > 0
    assert [trial.origin for trial in trials[:2]] == ["baseline"] * 2
    chance = [trial.number - 2 for trial in trials[2:] if trial.origin == "random"]
    assert chance == (list(range(20)) if sampler == "random" else [9, 19])


def both(stub, store, sampler):
    """Proposals 34 to 36 of the study that made the 34 before, and of one rebuilt from the stored trials."""
    text = stub.CAMPAIGN.replace('"nsga2"', f'"{sampler}"').replace("trials = 20", "trials = 60")
    campaign = Campaign.parse(text)
    ledger = Ledger(campaign, store, stub._environment())
    finish(ledger, store, stub, 34)
    rebuilt = Study(campaign, store.trials(ledger.id))
    for number in range(34, 37):
        known = ledger._known.__contains__
        yield ledger._study.propose(number, known), rebuilt.propose(number, known)


def test_a_restarted_study_proposes_what_the_running_one_would(stub, store):
    for ours, theirs in both(stub, store, "tpe"):
        assert (ours.architecture, ours.choices) == (theirs.architecture, theirs.choices)


def test_a_restarted_study_goes_on_in_its_generation(stub, store):
    # Optuna gives a generation's parents in another order the first time, so the draws themselves may differ.
    for ours, theirs in both(stub, store, "nsga2"):
        generation = ours.attributes["NSGAIISampler:generation"]
        assert generation == theirs.attributes["NSGAIISampler:generation"] >= 2


def test_a_space_without_anything_new_is_exhausted(stub, store):
    text = stub.CAMPAIGN.replace("any(1, 2, 3) ** layer", "attn(window=any(none, 8, 4)) + any(swiglu, mlp)")
    campaign = Campaign.parse(text.replace("any(16, 32, 48)", "16"))
    ledger = Ledger(campaign, store, stub._environment())
    finish(ledger, store, stub, 22)
    assert ledger.exhausted
    assert len({trial.digest for trial in ledger.trials}) == len(ledger.trials) == 2 + 6


def on_triton(stub, rules):
    text = stub.CAMPAIGN.replace(
        "any(1, 2, 3) ** layer, width=any(16, 32, 48)", f"{rules} + swiglu, width=16"
    )
    return text.replace("deadline_s = 5", 'deadline_s = 5\nbackend = "triton"').replace("<= 40e3", "<= 1e6")


def test_what_the_backend_has_no_kernel_for_is_refused_at_draw(stub, store):
    pytest.importorskip("triton")
    rules = "linear(rule=any(add, dplr), heads=1, key_dim=any(16, 256, 300))"
    ledger = Ledger(Campaign.parse(on_triton(stub, rules)), store, stub._environment())
    finish(ledger, store, stub, 22)
    drawn = [trial.text for trial in ledger.trials[2:]]
    assert len(drawn) == 5
    assert not any("rule=dplr" in text and "key_dim=300" in text for text in drawn)
    assert any("key_dim=300" in text for text in drawn)
    assert ledger.rejected["backend: triton"] > 0


def test_a_space_without_kernels_says_why_nothing_is_tried(stub, store):
    pytest.importorskip("triton")
    campaign = Campaign.parse(on_triton(stub, "linear(rule=dplr, heads=1, key_dim=any(300, 400))"))
    ledger = Ledger(campaign, store, stub._environment())
    finish(ledger, store, stub, 22)
    assert len(ledger.trials) == 2
    assert ledger.exhausted
    assert set(ledger.rejected) == {"backend: triton"}


def test_a_prefix_that_leaves_a_task_nothing_to_ask_is_refused_at_draw(stub, store):
    layer = "attn(mask=any(causal, prefix(4), prefix(16)), window=none)"
    text = stub.CAMPAIGN.replace("any(1, 2, 3) ** layer", f"any(1, 2) ** ({layer} + swiglu)")
    ledger = Ledger(Campaign.parse(text), store, stub._environment())
    finish(ledger, store, stub, 22)
    assert ledger.rejected["prefix"] > 0
    assert any("prefix(4)" in trial.text for trial in ledger.trials)
    assert not any("prefix(16)" in trial.text for trial in ledger.trials)


def test_shares_of_chance(campaign):
    import dataclasses

    def numbers(share):
        study = Study(dataclasses.replace(campaign, random_share=share))
        return [number - 2 for number in range(2, 32) if study.is_random(number)]

    assert numbers(0.0) == []
    assert numbers(0.1) == [9, 19, 29]
    assert numbers(0.3) == [3, 6, 9, 13, 16, 19, 23, 26, 29]
    assert numbers(1.0) == list(range(30))
