"""The loop: hand trials to workers, record what comes back, and keep the machine still while a latency is
taken.

Training keeps every worker busy. Every few trained candidates the loop lets the workers finish (it drains),
has the candidates profiled one after the other while nothing else runs, and goes on. The store is written
before anything is acted on, so the loop may be killed at any point.
"""

from __future__ import annotations

import math
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixforge.db.store import StaleToken, Store
from mixforge.db.values import Stage, State, Trial
from mixforge.evaluator.evaluation import Outcome
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.interruption import Interruption
from mixforge.orchestrator.ledger import Ledger
from mixforge.orchestrator.outlook import Outlook, outlook
from mixforge.orchestrator.pace import Pace
from mixforge.orchestrator.progress import Ending, Left, Phase, Progress, Running
from mixforge.orchestrator.workers import Ended, Job, Lost, Pool

Watch = Callable[[Progress], None]

# An evaluation looks at its deadline between steps; one that is not back so long after it hangs.
GRACE_S = 20.0
# After Ctrl-C: how long running work may take to come to its end and be recorded.
_FAREWELL_S = 10.0
_TICK_S = 0.05
# Draining is cheap where it idles the workers for no more than this share of a training each.
_CHEAP = 0.15
_REPORT_EVERY_S = 0.1
# While a latency is taken the driver keeps as still as it can.
_REPORT_QUIETLY_S = 0.5
_SPEND_EVERY_S = 5.0
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Going:
    """A trial that a worker is at."""

    trial: Trial
    stage: Stage
    since: float
    """By the pace's clock."""


class Loop:
    """One run of a campaign on one pool of workers."""

    def __init__(
        self,
        campaign: Campaign,
        store: Store,
        ledger: Ledger,
        pool: Pool,
        interruption: Interruption,
        pace: Pace,
        *,
        weights: Path | None = None,
        watch: Watch | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        """`grace_s`: how far past the budget's deadline a worker is taken to hang."""
        self._campaign, self._store, self._ledger, self._pool = campaign, store, ledger, pool
        self._interruption, self._pace, self._weights, self._watch = interruption, pace, weights, watch
        self._limit_s = campaign.budget.deadline_s + grace_s
        self._batch = batch_size(campaign.trials, pool.size)
        self._phase: Phase = "training"
        self._going: dict[int, _Going] = {}
        self._dry: Literal["trials", "hours", "exhausted"] | None = None
        self._note: str | None = None
        self._farewell_at: float | None = None
        self._run = store.begin_run(ledger.id, f"{socket.gethostname()}:{os.getpid()}")
        self._reported_at = self._spent_at = self._look_again_at = -math.inf
        self._looked, self._looked_at_trials = Outlook(best=(), front=0, volumes=None), 0

    def run(self) -> Ending:
        """Until the campaign has what it asks for, its hours are spent, or a signal has come.

        Raises RuntimeError where another run of the campaign took over a trial, and StoreError where the
        database cannot be written; what was recorded until then is kept.
        """
        while (why := self._why_over()) is None:
            self._fill()
            for ended in self._pool.wait(_TICK_S):
                self._record(ended)
            self._report()
        if why == "interrupted":
            self._store.abandon_open_attempts(self._ledger.id, "the search was interrupted")
        self._store.spend(self._run, self._pace.elapsed_s, ended=True)
        self._phase = "ended"
        progress = self._progress()
        if self._watch is not None:
            self._watch(progress)
        return Ending(why=why, signal=self._interruption.signal, progress=progress)

    def _why_over(self) -> Literal["trials", "hours", "exhausted", "interrupted"] | None:
        if self._interruption.signal is not None:
            return "interrupted" if self._farewell_over() else None
        over = self._phase == "training" and not self._going and not self._ledger.waiting
        return self._dry if over else None

    def _fill(self) -> None:
        """Give idle workers what they may do in this phase."""
        if self._interruption.signal is not None:
            self._phase = "stopping"
            return
        if self._phase == "training" and self._should_drain():
            self._phase = "draining"
        if self._phase == "draining" and not self._going:
            self._phase = "profiling"
        if self._phase == "profiling":
            self._profile_next()
        if self._phase == "training":
            for slot in self._pool.idle():
                trial = None if self._should_drain() else self._next_to_train()
                if trial is None:
                    break
                self._start(slot, trial, "train")

    def _should_drain(self) -> bool:
        """Whether to let the workers come to an end. Between one and two batches, where it costs little."""
        waiting = self._ledger.waiting
        if waiting == 0 or self._dry is not None or waiting >= 2 * self._batch:
            return waiting > 0
        due = waiting >= self._batch or self._ledger.baselines_wait
        return due and self._draining_idles_s() <= _CHEAP * self._pool.size * self._pace.typical_s("train")

    def _draining_idles_s(self) -> float:
        """How long the workers would have nothing to do, all together, if they were drained now."""
        left_s = self._jobs_left_s()
        return max(left_s, default=0.0) * self._pool.size - sum(left_s)

    def _jobs_left_s(self, stage: Stage | None = None) -> list[float]:
        """How long each running job is likely to take yet."""
        going = self._going.items()
        return [self._left_s(slot, each) for slot, each in going if stage in (None, each.stage)]

    def _left_s(self, slot: int, going: _Going) -> float:
        """How long a job is likely to take yet: by its steps, or as long as others took."""
        seconds = self._pace.clock() - going.since
        mark = self._pool.mark(slot)
        # The board has no lock: a line that is being written may be read with nothing in it.
        if mark is None or mark.step < 1:
            return max(0.0, self._pace.typical_s(going.stage) - seconds)
        return seconds * (mark.steps - mark.step) / mark.step

    def _profile_next(self) -> None:
        # A worker that is starting loads torch, which would be heard in a latency as much as training.
        if self._going or len(self._pool.idle()) < self._pool.size:
            return
        trial = self._ledger.next_to_profile()
        if trial is None:
            self._phase = "training"
        else:
            self._start(0, trial, "profile")

    def _next_to_train(self) -> Trial | None:
        """The next trial, and in `_dry` why there is none."""
        ahead = self._ledger.waiting + len(self._going)
        if not self._pace.time_for_another(ahead):
            self._dry = "hours"
            return None
        self._dry = None
        trial = self._ledger.next_to_train()
        # A proposal that is answered by what is stored needs no worker.
        while trial is None and not self._should_drain() and self._interruption.signal is None:
            if not self._ledger.propose():
                self._dry = "exhausted" if self._ledger.exhausted else "trials"
                return None
            trial = self._ledger.next_to_train()
        return trial

    def _start(self, slot: int, trial: Trial, stage: Stage) -> None:
        token = self._ledger.claim(trial, stage, f"{socket.gethostname()}:{os.getpid()}/{slot}")
        job = Job(
            token=token,
            stage=stage,
            architecture=self._ledger.architecture(trial.number),
            budget=self._campaign.budget,
            weights=self._weights_file(trial),
        )
        self._pool.submit(slot, job, self._limit_s)
        self._going[slot] = _Going(trial=trial, stage=stage, since=self._pace.clock())

    def _weights_file(self, trial: Trial) -> Path | None:
        # One architecture has other weights under another budget, and both may be in one folder.
        folder = self._weights
        return None if folder is None else folder / f"{trial.digest}-{trial.budget[:12]}.safetensors"

    def _record(self, ended: Ended) -> None:
        going = self._going.pop(ended.slot)
        try:
            trial = self._ledger.record(going.trial.number, ended)
        except StaleToken as error:
            raise RuntimeError(
                f"another run of campaign {self._campaign.name!r} works on {self._store.database.name} ({error}); "
                "wait for it, or end it and run this command again"
            ) from error
        if trial.state is State.proposed:
            # It is there to be trained again, whatever was said when there was nothing left.
            self._dry = None
        if isinstance(ended.result, Lost):
            next_step = "it is tried again" if trial.state is not State.finished else "it is not tried again"
            self._note = f"trial {trial.number}: {ended.result.reason}; {next_step}"
        elif trial.outcome not in (None, Outcome.ok):
            self._note = f"trial {trial.number}: {trial.outcome} ({trial.reason})"
        if not isinstance(ended.result, Lost):
            self._pace.note(ended.job.stage, ended.seconds)

    def _farewell_over(self) -> bool:
        """After a signal: whether nothing that runs is likely to come to its end within the time that is
        left.
        """
        now = self._pace.clock()
        if self._farewell_at is None:
            self._farewell_at = now + _FAREWELL_S
        left = self._farewell_at - now
        if self._interruption.times > 1 or left <= 0:
            return True
        return not any(left_s <= left for left_s in self._jobs_left_s())

    def _report(self) -> None:
        now = self._pace.clock()
        if now - self._spent_at >= _SPEND_EVERY_S:
            self._store.spend(self._run, self._pace.elapsed_s)
            self._spent_at = now
        every_s = _REPORT_QUIETLY_S if self._phase == "profiling" else _REPORT_EVERY_S
        if self._watch is not None and now - self._reported_at >= every_s:
            self._watch(self._progress())
            self._reported_at = now

    def _progress(self) -> Progress:
        ledger, campaign = self._ledger, self._campaign
        finished = [trial for trial in ledger.trials if trial.state is State.finished]
        baselines = sum(ledger.is_baseline(trial.number) for trial in finished)
        found = self._outlook(finished)
        searched = len(finished) - baselines
        return Progress(
            campaign=campaign.name,
            phase="starting" if not self._going and not self._pool.idle() else self._phase,
            baselines_done=baselines,
            baselines=ledger.baselines,
            trials_done=searched,
            trials=campaign.trials,
            outcomes=Counter(trial.outcome for trial in finished if trial.outcome is not None),
            reused=sum(trial.reused for trial in ledger.trials),
            waiting=ledger.waiting,
            running=tuple(self._running(slot, going) for slot, going in sorted(self._going.items())),
            rejected=dict(ledger.rejected),
            best=found.best,
            front=found.front,
            volumes=found.volumes,
            elapsed_s=self._pace.elapsed_s,
            spent_s=self._pace.spent_s,
            left=self._left(len(finished)),
            idle_share=self._pace.idle_share(going.since for going in self._going.values()),
            note=self._note,
        )

    def _left(self, finished: int) -> Left | None:
        if self._phase in ("stopping", "ended"):
            return None
        asked, ahead = self._campaign.trials, self._ledger.waiting + len(self._going)
        to_train = None if asked is None else max(0, self._ledger.baselines + asked - finished - ahead)
        if self._dry is not None or not self._pace.time_for_another(ahead):
            to_train = 0
        training_s = self._jobs_left_s("train")
        to_profile = self._ledger.waiting + len(training_s)
        return self._pace.left(to_train, to_profile, training_s, sum(self._jobs_left_s("profile")))

    def _outlook(self, finished: list[Trial]) -> Outlook:
        """Best values, front and hypervolumes: not while a latency is taken, and for a twentieth of the time."""
        now = self._pace.clock()
        ended = self._phase == "ended"
        if self._looked_at_trials == len(finished) or (not ended and self._phase == "profiling"):
            return self._looked
        if ended or now >= self._look_again_at:
            self._looked = outlook(finished, self._campaign.objectives)
            self._looked_at_trials = len(finished)
            self._look_again_at = self._pace.clock() + max(_LOOK_EVERY_S, 20 * (self._pace.clock() - now))
        return self._looked

    def _running(self, slot: int, going: _Going) -> Running:
        number = going.trial.number
        mark = self._pool.mark(slot)
        return Running(
            number=number,
            name=self._ledger.name(number),
            text=going.trial.text,
            stage=going.stage,
            attempt=self._ledger.attempt(number, going.stage),
            seconds=self._pace.clock() - going.since,
            task=None if mark is None else self._campaign.budget.tasks[mark.task].name,
            step=None if mark is None else mark.step,
            steps=None if mark is None else mark.steps,
            loss=None if mark is None else mark.loss,
        )


def batch_size(trials: int | None, workers: int) -> int:
    """How many trained candidates are gathered before the workers are drained to profile them.

    The loop gathers up to twice as many until draining is cheap. At four trainings a worker it costs a few
    parts in a hundred of the time; a small budget takes fewer, so that the sampler learns some eight times.
    """
    most = 4 * workers
    return most if trials is None else max(workers, min(most, math.ceil(trials / 8)))
