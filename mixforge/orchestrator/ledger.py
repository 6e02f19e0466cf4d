"""A campaign's trials in memory, in step with the store: which are to be trained or profiled next, and what
came of those that were.

Everything is stored before it is acted on, so whatever kills this process, another one finds where it stood.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from mixforge.db.store import Store
from mixforge.db.values import Attempt, Proposal, Stage, State, Trial, describe
from mixforge.evaluator.evaluation import Environment, Evaluation, Outcome, Profile
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.study import BASELINE, Draft, Study
from mixforge.orchestrator.workers import Ended, Lost
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import parse

ATTEMPTS = 2
"""How often one stage of a trial may cost its worker before the trial ends with that outcome."""


class Ledger:
    """The trials of one campaign, by number: the baselines first, then the search's."""

    def __init__(self, campaign: Campaign, store: Store, environment: Environment) -> None:
        """Adds the campaign to the store where it is new, and takes over the trials that another run left
        open.

        Raises ValueError where the store has another campaign of that name, or this one on other data.
        """
        self._campaign, self._store, self._environment = campaign, store, environment
        self._budget = campaign.budget.digest
        self.id = store.add_campaign(campaign.name, campaign.digest, campaign.text, campaign.seed)
        # The campaign's digest is of its file; the budget's is of the text behind it too.
        if any(trial.budget != self._budget for trial in store.trials(self.id)):
            raise ValueError(
                f"campaign {campaign.name!r} was begun with another text or budget (the data that [tasks] reads have "
                "changed since), and figures of two texts do not compare; give the campaign a new name"
            )
        store.abandon_open_attempts(self.id)
        self.trials: list[Trial] = list(store.trials(self.id))
        self._known = {trial.digest for trial in self.trials}
        self._architectures: dict[int, Architecture] = {}
        before = store.attempts(self.id)
        self._failures = _failures(self.trials, before)
        self.durations = [
            (attempt.stage, attempt.seconds)
            for attempt in before
            if attempt.outcome is Outcome.ok and attempt.seconds is not None
        ]
        """How long the stages of earlier runs took, in seconds."""
        self._to_train = deque(trial.number for trial in self.trials if trial.state is State.proposed)
        self._to_profile = deque(trial.number for trial in self.trials if trial.state is State.trained)
        self.rejected: Counter[str] = Counter()
        for trial in self.trials:
            self.rejected.update(trial.rejected)
        self._study = Study(campaign, self.trials)
        self.exhausted = False

    @property
    def baselines(self) -> int:
        return len(self._campaign.baselines)

    @property
    def waiting(self) -> int:
        """Trials that are trained and wait to be profiled."""
        return len(self._to_profile)

    @property
    def baselines_wait(self) -> bool:
        """Whether all baselines are trained, and one of them waits to be profiled."""
        if not any(map(self.is_baseline, self._to_profile)):
            return False
        ends = (State.trained, State.finished)
        baselines = self.trials[: self.baselines]
        return len(baselines) == self.baselines and all(trial.state in ends for trial in baselines)

    def is_baseline(self, number: int) -> bool:
        return number < self.baselines

    def name(self, number: int) -> str:
        """What a trial is called: a baseline's name, or its origin."""
        if self.is_baseline(number):
            return self._campaign.baselines[number].name
        return self.trials[number].origin

    def architecture(self, number: int) -> Architecture:
        if number not in self._architectures:
            self._architectures[number] = parse(self.trials[number].text)
        return self._architectures[number]

    def attempt(self, number: int, stage: Stage) -> int:
        """Which attempt at the stage the next or present one is, from 1."""
        return self._failures[number, stage] + 1

    def next_to_train(self) -> Trial | None:
        """A trial that was proposed, left open or failed once."""
        return self.trials[self._to_train.popleft()] if self._to_train else None

    def next_to_profile(self) -> Trial | None:
        return self.trials[self._to_profile.popleft()] if self._to_profile else None

    @property
    def all_proposed(self) -> bool:
        """Whether the campaign has as many trials as it asks for, or can find no more."""
        asked = self._campaign.trials
        return self.exhausted or (asked is not None and len(self.trials) >= self.baselines + asked)

    def propose(self) -> bool:
        """Add a trial; it is then to be trained, or answered by what is stored. False where there are no
        more.
        """
        if self.all_proposed:
            return False
        number = len(self.trials)
        if self.is_baseline(number):
            draft = Draft(
                architecture=self._campaign.baselines[number].architecture,
                origin=BASELINE,
                choices=(),
                attributes={},
                rejected={},
            )
        else:
            found = self._study.propose(number, self._known.__contains__)
            if not isinstance(found, Draft):
                self.rejected.update(found)
                self.exhausted = True
                return False
            draft = found
        self._add(number, draft)
        return True

    def claim(self, trial: Trial, stage: Stage, worker: str) -> int:
        return self._store.claim(trial.id, stage, worker)

    def record(self, number: int, ended: Ended) -> Trial:
        """Store what became of a job, and tell the sampler of a trial that it finished. Raises StaleToken."""
        token, result = ended.job.token, ended.result
        match result:
            case Evaluation():
                trial = self._store.record_evaluation(token, result, seconds=ended.seconds)
            case Profile():
                trial = self._store.record_profile(token, result, seconds=ended.seconds)
            case Lost():
                trial = self._record_loss(number, ended, result)
        self._settle(trial)
        return trial

    def _record_loss(self, number: int, ended: Ended, lost: Lost) -> Trial:
        self._failures[number, ended.job.stage] += 1
        last = self._failures[number, ended.job.stage] >= ATTEMPTS
        reason = f"{lost.reason} (attempt {self._failures[number, ended.job.stage]} of {ATTEMPTS})"
        return self._store.record_failure(
            ended.job.token, lost.outcome, reason, lost.trace, seconds=ended.seconds, last=last
        )

    def _settle(self, trial: Trial) -> None:
        """Put a trial where its state says that it waits."""
        self.trials[trial.number] = trial
        match trial.state:
            case State.proposed:
                self._to_train.appendleft(trial.number)
            case State.trained:
                self._to_profile.append(trial.number)
            case State.finished:
                self._architectures.pop(trial.number, None)
                self._study.tell(trial)
            case _:
                raise AssertionError(f"trial {trial.number} is {trial.state} after its attempt has ended")

    def _add(self, number: int, draft: Draft) -> None:
        proposal = Proposal(
            number=number,
            architecture=describe(draft.architecture),
            budget=self._budget,
            origin=draft.origin,
            choices=draft.choices,
            attributes=draft.attributes,
            rejected=draft.rejected,
        )
        key = self._store.propose(self.id, proposal)
        self.rejected.update(draft.rejected)
        self._architectures[number] = draft.architecture
        self._known.add(proposal.architecture.digest)
        answered = self._store.answer(key, environment=self._environment)
        trial = answered or self._store.trial(key)
        self.trials.append(trial)
        self._settle(trial)


def _failures(trials: Sequence[Trial], attempts: Sequence[Attempt]) -> Counter[tuple[int, Stage]]:
    """Attempts that ended without a result. Those that a dead driver left are no fault of the trial's."""
    numbers = {trial.id: trial.number for trial in trials}
    return Counter(
        (numbers[attempt.trial], attempt.stage)
        for attempt in attempts
        if attempt.outcome not in (None, Outcome.ok)
    )
