"""Workers claim, record, fail and are abandoned in any order; the store agrees with a small model."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from mixforge.db.store import StaleToken, Store
from mixforge.db.values import State
from mixforge.evaluator.evaluation import Outcome

AFTER_FAILURE = {State.training: State.proposed, State.profiling: State.trained}


@pytest.fixture
def machine(empty_file, samples):
    class Workers(RuleBasedStateMachine):
        tokens = Bundle("tokens")

        def __init__(self):
            super().__init__()
            self.folder = tempfile.TemporaryDirectory()
            path = Path(self.folder.name) / "mixforge.db"
            shutil.copy(empty_file, path)
            self.store = Store.open(path)
            self.campaign = self.store.add_campaign("laptop", "d", "", 1)
            self.state = {}
            self.holder = {}
            self.finished = {}

        def teardown(self):
            self.store.close()
            self.folder.cleanup()

        @initialize()
        def propose(self):
            for number in range(3):
                # The first two are one architecture.
                key = self.store.propose(self.campaign, samples.proposal(number, n=number // 2))
                self.state[key] = State.proposed

        @rule(target=tokens, trial=st.integers(1, 3), stage=st.sampled_from(["train", "profile"]))
        def claim(self, trial, stage):
            waiting, working = {
                "train": (State.proposed, State.training),
                "profile": (State.trained, State.profiling),
            }[stage]
            if self.state[trial] not in (waiting, working):
                with pytest.raises(ValueError, match="cannot be claimed"):
                    self.store.claim(trial, stage, "w")
                return (trial, stage, 10**6)
            token = self.store.claim(trial, stage, "w")
            assert all(token > old for old in self.holder.values())
            self.state[trial], self.holder[trial] = working, token
            return (trial, stage, token)

        @rule(held=tokens, ok=st.booleans())
        def record(self, held, ok):
            trial, stage, token = held
            outcome = Outcome.ok if ok else Outcome.diverged
            if self.holder.get(trial) != token:
                with pytest.raises(StaleToken):
                    self._record(stage, token, outcome)
                return
            found = self._record(stage, token, outcome)
            del self.holder[trial]
            # Of one architecture the first evaluation counts, whatever a later one says.
            first = self.store.evaluation(found.digest, found.budget).outcome
            to_profile = stage == "train" and first is Outcome.ok
            self.state[trial] = State.trained if to_profile else State.finished

        def _record(self, stage, token, outcome):
            reason = None if outcome is Outcome.ok else "because"
            if stage == "train":
                evaluation = samples.evaluation(2.0, outcome=outcome, reason=reason)
                return self.store.record_evaluation(token, evaluation, seconds=1.0)
            profile = samples.profile(1.0, outcome=outcome, reason=reason)
            return self.store.record_profile(token, profile, seconds=1.0)

        @rule(held=tokens, last=st.booleans())
        def fail(self, held, last):
            trial, _, token = held
            if self.holder.get(trial) != token:
                with pytest.raises(StaleToken):
                    self.store.record_failure(token, Outcome.crashed, "died", seconds=1.0, last=last)
                return
            self.store.record_failure(token, Outcome.crashed, "died", seconds=1.0, last=last)
            del self.holder[trial]
            self.state[trial] = State.finished if last else AFTER_FAILURE[self.state[trial]]

        @rule()
        def abandon(self):
            assert self.store.abandon_open_attempts(self.campaign) == len(self.holder)
            for trial in self.holder:
                self.state[trial] = AFTER_FAILURE[self.state[trial]]
            self.holder = {}

        @rule(trial=st.integers(1, 3))
        def answer(self, trial):
            before = self.store.trial(trial)
            stored = self.store.evaluation(before.digest, before.budget)
            answered = self.store.answer(trial)
            if self.state[trial] is not State.proposed or stored is None:
                assert answered is None
            else:
                self.state[trial] = State.trained if stored.outcome is Outcome.ok else State.finished

        @invariant()
        def store_agrees(self):
            trials = self.store.trials(self.campaign)
            assert {trial.id: trial.state for trial in trials} == self.state
            for trial in trials:
                assert (trial.outcome is not None) == (trial.state is State.finished)
                if trial.state is State.finished:
                    # A finished trial is never changed.
                    assert self.finished.setdefault(trial.id, trial) == trial
            attempts = self.store.attempts(self.campaign)
            open_ones = {attempt.trial: attempt.token for attempt in attempts if attempt.ended_at is None}
            assert open_ones == self.holder

    return Workers


def test_any_order_of_events(machine):
    calm = settings(
        max_examples=12,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    machine.TestCase.settings = calm
    machine.TestCase("runTest").runTest()
