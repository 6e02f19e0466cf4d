"""The loop on workers without processes: its order, its quiet while a latency is taken, its budgets and
retries.
"""

from __future__ import annotations

import itertools

import pytest

from mixforge.db.values import State
from mixforge.evaluator.evaluation import Outcome
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.interruption import Interruption
from mixforge.orchestrator.loop import batch_size
from mixforge.orchestrator.workers import Lost


def test_a_campaign_ends_with_all_its_trials(campaign, store, still, start):
    ending = start(campaign, store, still).run()
    trials = store.trials(1)
    assert ending.why == "trials"
    assert len(trials) == 22
    assert all(trial.outcome is Outcome.ok for trial in trials)
    assert {trial.origin for trial in trials} == {"baseline", "random", "nsga2"}
    assert [trial.origin == "baseline" for trial in trials] == [True] * 2 + [False] * 20
    progress = ending.progress
    assert (progress.trials_done, progress.baselines_done, progress.waiting) == (20, 2, 0)
    assert progress.outcomes == {Outcome.ok: 22}
    assert progress.front >= 1
    assert 0 < progress.volumes.random <= progress.volumes.search
    assert progress.volumes.search_matched <= progress.volumes.search
    assert "all that the campaign asks for" in ending.sentence
    # Every trial was trained once and profiled once.
    assert len(still.history) == 44
    assert len({(stage, digest) for _, stage, digest, _, _ in still.history}) == 44


def test_a_campaign_that_finds_nothing_says_what_its_draws_were_refused_for(stub, store, still, start):
    text = stub.CAMPAIGN.replace(
        "any(1, 2, 3) ** layer, width=any(16, 32, 48)", "attn(mask=prefix(16)) + swiglu, width=16"
    )
    ending = start(Campaign.parse(text), store, still).run()
    assert ending.why == "exhausted"
    assert len(store.trials(1)) == 2
    assert set(ending.progress.rejected) == {"prefix"}
    assert f"Draws were refused for: prefix {ending.progress.rejected['prefix']}. Widen" in ending.sentence


def test_nothing_runs_beside_a_profile(campaign, store, pool_of, start):
    # Trainings of uneven length, so that the workers come to an end at different times.
    pool = pool_of(3, seconds=lambda job: 0.2 if job.stage == "profile" else 1 + job.token % 5)
    start(campaign, store, pool).run()
    beside = [
        pair
        for pair in itertools.combinations(pool.history, 2)
        if pair[0][3] < pair[1][4] and pair[1][3] < pair[0][4]
    ]
    assert beside
    assert all(one[1] == other[1] == "train" for one, other in beside)
    # The baselines' figures come first.
    profiled = [digest for _, stage, digest, _, _ in pool.history if stage == "profile"]
    assert set(profiled[:2]) == {baseline.architecture.digest for baseline in campaign.baselines}
    assert [stage for _, stage, _, _, _ in pool.history].index("profile") <= 6


def test_workers_are_seldom_idle(campaign, store, still, start):
    ending = start(campaign, store, still).run()
    assert ending.progress.idle_share < 0.1


def test_batches_suit_the_budget():
    assert batch_size(60, 2) == 8
    assert batch_size(None, 2) == 8
    assert batch_size(10, 2) == 2
    assert batch_size(3, 4) == 4
    assert batch_size(10_000, 16) == 64


def test_hours_end_a_campaign_on_time_and_survive_a_restart(stub, store, pool_of, start):
    text = stub.CAMPAIGN.replace("trials = 20", "hours = 0.01")
    pool = pool_of(2, seconds=lambda job: 2.0 if job.stage == "train" else 0.5)
    first = start(Campaign.parse(text), store, pool).run()
    assert first.why == "hours"
    assert 30 <= first.progress.spent_s <= 37
    assert first.progress.waiting == 0
    assert store.spent_s(1) == pytest.approx(first.progress.spent_s)
    again = start(Campaign.parse(text), store, pool_of(2)).run()
    assert again.progress.trials_done == first.progress.trials_done
    more = start(Campaign.parse(text.replace("0.01", "0.02")), store, pool_of(2)).run()
    assert more.progress.trials_done > first.progress.trials_done
    assert more.progress.spent_s <= 73


def test_more_trials_go_on_where_it_ended(stub, campaign, store, pool_of, start):
    start(campaign, store, pool_of(2)).run()
    pool = pool_of(2)
    ending = start(Campaign.parse(stub.CAMPAIGN.replace("trials = 20", "trials = 25")), store, pool).run()
    assert ending.progress.trials_done == 25
    assert len(pool.history) == 10


def test_one_loss_costs_one_attempt(campaign, store, stub, pool_of, start):
    seen = []

    def do(job):
        seen.append((job.stage, job.architecture.digest))
        if seen.count(seen[-1]) == 1 and job.architecture.digest[0] in "0123":
            return Lost(outcome=Outcome.crashed, reason="its worker process died")
        return stub.answer(job)

    notes = set()
    ending = start(campaign, store, pool_of(2, do), watch=lambda progress: notes.add(progress.note)).run()
    assert ending.progress.outcomes == {Outcome.ok: 22}
    lost = [attempt for attempt in store.attempts(1) if attempt.outcome is Outcome.crashed]
    assert lost
    assert all("attempt 1 of 2" in attempt.reason for attempt in lost)
    assert len(store.attempts(1)) == 44 + len(lost)
    assert any(note and "it is tried again" in note for note in notes)


@pytest.mark.parametrize("stage", ["train", "profile"])
def test_two_losses_end_a_trial(campaign, store, stub, pool_of, start, stage):
    def do(job):
        if job.stage == stage and job.architecture.digest[0] in "01234567":
            return Lost(outcome=Outcome.timed_out, reason="no answer within 25 s")
        return stub.answer(job)

    ending = start(campaign, store, pool_of(2, do)).run()
    assert ending.why == "trials"
    outcomes = ending.progress.outcomes
    assert outcomes[Outcome.timed_out] + outcomes[Outcome.ok] == 22
    assert outcomes[Outcome.timed_out] >= 3
    for trial in store.trials(1):
        attempts = [each for each in store.attempts(1) if each.trial == trial.id and each.stage == stage]
        assert len(attempts) == (2 if trial.outcome is Outcome.timed_out else 1)


def test_a_bad_outcome_is_a_result(campaign, store, stub, pool_of, start):
    def do(job):
        if job.stage == "train" and job.architecture.digest[0] in "01234567":
            return stub.answer(job, Outcome.diverged, "loss is nan at step 3 of 4")
        return stub.answer(job)

    pool = pool_of(2, do)
    ending = start(campaign, store, pool).run()
    assert ending.progress.outcomes[Outcome.diverged] >= 3
    trained = [digest for _, stage, digest, _, _ in pool.history if stage == "train"]
    assert len(trained) == len(set(trained)) == 22


def test_a_known_architecture_is_not_evaluated_again(stub, campaign, store, pool_of, start):
    start(campaign, store, pool_of(2)).run()
    known = {trial.digest for trial in store.trials(1)}
    pool = pool_of(2)
    other = Campaign.parse(stub.CAMPAIGN.replace('name = "tiny"', 'name = "other"').replace("nsga2", "tpe"))
    ending = start(other, store, pool).run()
    assert ending.progress.trials_done == 20
    assert ending.progress.reused >= 3
    assert known.isdisjoint(digest for _, _, digest, _, _ in pool.history)
    reused = [trial for trial in store.trials(2) if trial.reused]
    assert all(trial.state is State.finished and "decode_ms" in trial.figures for trial in reused)
    # Under another budget everything is new.
    pool = pool_of(2)
    text = stub.CAMPAIGN.replace('name = "tiny"', 'name = "longer"').replace("steps = 4", "steps = 5")
    assert start(Campaign.parse(text), store, pool).run().progress.reused == 0


def test_an_interruption_records_what_ends_soon(campaign, store, stub, pool_of, start):
    interruption = Interruption()

    def do(job):
        if job.token == 9:
            interruption.note(2, None)
        return stub.answer(job)

    ending = start(campaign, store, pool_of(2, do), interruption=interruption).run()
    assert (ending.why, ending.signal) == ("interrupted", 2)
    assert "Run the same command again" in ending.sentence
    assert all(attempt.outcome is Outcome.ok for attempt in store.attempts(1))
    pool = pool_of(2)
    again = start(campaign, store, pool).run()
    assert again.progress.outcomes == {Outcome.ok: 22}
    assert len(store.attempts(1)) == 44


def test_an_interruption_does_not_wait_for_long_work(campaign, store, pool_of, start):
    interruption = Interruption()
    pool = pool_of(2, seconds=lambda job: 1.0 if job.token < 9 else 1e6)
    loop = start(
        campaign,
        store,
        pool,
        interruption=interruption,
        watch=lambda progress: interruption.note(15, None) if pool.now > 6 else None,
    )
    ending = loop.run()
    assert ending.why == "interrupted"
    assert pool.now < 100
    assert not [attempt for attempt in store.attempts(1) if attempt.ended_at is None]
    assert start(campaign, store, pool_of(2)).run().progress.outcomes == {Outcome.ok: 22}


def test_a_second_run_takes_over(campaign, store, pool_of, start):
    one = start(campaign, store, pool_of(2))
    one._fill()
    start(campaign, store, pool_of(2)).run()
    with pytest.raises(RuntimeError, match="another run of campaign 'tiny' works on"):
        one.run()


def test_another_content_of_the_same_name_is_refused(stub, campaign, store, pool_of, start):
    start(campaign, store, pool_of(2)).run()
    with pytest.raises(ValueError, match="another content"):
        start(Campaign.parse(stub.CAMPAIGN.replace("seed = 3", "seed = 4")), store, pool_of(2))


def test_progress_while_it_runs(campaign, store, pool_of, start):
    seen = []
    start(campaign, store, pool_of(2), watch=seen.append).run()
    assert [progress.phase for progress in seen][-1] == "ended"
    assert {"training", "profiling"} <= {progress.phase for progress in seen}
    done = [progress.trials_done for progress in seen]
    assert done == sorted(done)
    middle = next(progress for progress in seen if progress.trials_done > 5 and progress.running)
    assert middle.running[0].text.startswith("lm(")
    assert middle.left.seconds > 0
    assert {best.figure for best in middle.best} == {"recall", "decode_ms"}


@pytest.mark.parametrize(
    ("bounds", "why", "first_at_most"),
    [
        ("trials = 20", "trials", False),
        ("hours = 0.01", "hours", False),
        ("trials = 40\nhours = 0.01", "hours", True),
        ("trials = 10\nhours = 0.05", "trials", True),
    ],
)
def test_the_time_that_is_said_to_be_left_is_about_what_it_takes(
    bounds, why, first_at_most, stub, store, pool_of, start
):
    pool = pool_of(2, seconds=lambda job: 2.0 + 2 * (job.token % 3) if job.stage == "train" else 1.5)
    seen = []
    text = stub.CAMPAIGN.replace("trials = 20", bounds)
    ending = start(
        Campaign.parse(text), store, pool, watch=lambda found: seen.append((pool.now, found))
    ).run()
    assert ending.why == why
    assert ending.progress.left is None
    said = [(pool.now - now, found.left) for now, found in seen if found.left is not None]
    at_most = [each for each in said if each[1].at_most]
    about = [each for each in said if not each[1].at_most]
    assert bool(at_most) == first_at_most
    assert all(left.seconds >= true_s for true_s, left in at_most)
    # Hours end a campaign up to a training and its profiles early.
    assert all(abs(left.seconds - true_s) <= 5.5 for true_s, left in about)
    last = [abs(left.seconds - true_s) for true_s, left in about if true_s <= 5]
    assert len(last) > 5
    assert max(last) <= 2.5


def test_work_that_outlasts_the_hours_is_not_said_to_end_at_once(stub, store, pool_of, start):
    text = stub.CAMPAIGN.replace("trials = 20", "hours = 0.01")
    pool = pool_of(2, seconds=lambda job: 1.0 if job.token <= 4 else 60.0)
    seen = []
    start(Campaign.parse(text), store, pool, watch=seen.append).run()
    late = [found for found in seen if found.spent_s > 40 and any(e.stage == "train" for e in found.running)]
    assert late
    # Their profiles are yet to be taken.
    assert all(found.left is not None and found.left.seconds >= 1.0 for found in late)


def test_a_search_that_is_stopping_says_no_time(campaign, store, pool_of, start):
    interruption, seen = Interruption(), []

    def watch(progress):
        seen.append(progress)
        if pool.now > 6:
            interruption.note(15, None)

    pool = pool_of(2, seconds=lambda job: 1.0 if job.token < 9 else 5.0)
    start(campaign, store, pool, interruption=interruption, watch=watch).run()
    stopping = [progress for progress in seen if progress.phase == "stopping"]
    assert stopping
    assert all(progress.left is None for progress in stopping)
