"""How long a search has worked, how long its stages take, and whether there is time for another trial."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mixforge.db.values import Stage
from mixforge.orchestrator.progress import Left

Clock = Callable[[], float]
_RECENT = 30


@dataclass(slots=True)
class Pace:
    """Seconds by a monotonic clock. `before_s`: what earlier runs of the campaign spent."""

    clock: Clock
    workers: int
    before_s: float
    hours: float | None
    durations: Sequence[tuple[Stage, float]] = ()
    """How long the stages of earlier runs took."""
    started: float = field(init=False)
    busy_s: float = 0.0
    """Worker time in jobs that have ended well."""
    _recent: dict[Stage, deque[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()
        self._recent = {"train": deque(maxlen=_RECENT), "profile": deque(maxlen=_RECENT)}
        for stage, seconds in self.durations:
            self._recent[stage].append(seconds)

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.started

    @property
    def spent_s(self) -> float:
        return self.before_s + self.elapsed_s

    def note(self, stage: Stage, seconds: float) -> None:
        """A job of this stage took so long. A profile has the whole machine."""
        self.busy_s += seconds * (self.workers if stage == "profile" else 1)
        self._recent[stage].append(seconds)

    def idle_share(self, going_since: Iterable[float]) -> float:
        """The share of the workers' time that was in no job. `going_since`: when the running ones were
        started.
        """
        total = self.workers * self.elapsed_s
        going = sum(self.clock() - since for since in going_since)
        return max(0.0, 1.0 - (self.busy_s + going) / total) if total > 0 else 0.0

    def typical_s(self, stage: Stage) -> float:
        """The median of the last jobs; 0 while there is none."""
        recent = self._recent[stage]
        return statistics.median(recent) if recent else 0.0

    def time_for_another(self, to_profile: int) -> bool:
        """Whether one more trial is likely to be trained and profiled before the hours are spent.

        `to_profile`: trials that will want a profile before it.
        """
        if self.hours is None:
            return True
        recent = sorted(self._recent["train"])
        # Every fourth one takes longer than this, so that the end is seldom late by much.
        train_s = recent[(3 * len(recent)) // 4] if recent else 0.0
        needed_s = train_s + (to_profile + 1) * self.typical_s("profile")
        return self.spent_s + needed_s < self.hours * 3600

    def left(
        self, to_train: int | None, to_profile: int, training_s: Sequence[float], profiling_s: float
    ) -> Left | None:
        """An estimate of the time to the end; None while there is nothing to estimate it from.

        to_train: trials that are to be begun yet; None where only the hours bound them. to_profile: those that are
        trained or in training. training_s: how long each running training is likely to take yet, profiling_s: the
        same of a running profile.
        """
        profile_s = self.typical_s("profile")
        profiling = to_profile * profile_s + profiling_s
        # What has begun comes to its end, whatever the hours are.
        begun = max(training_s, default=0.0) + profiling
        bound = None if self.hours is None else max(begun, self.hours * 3600 - self.spent_s)
        if to_train is None:
            return None if bound is None else Left(seconds=bound)
        if not all(self._recent.values()):
            return None if bound is None else Left(seconds=bound, at_most=True)
        if to_train == 0:
            return Left(seconds=begun)
        training = (to_train * self.typical_s("train") + sum(training_s)) / self.workers
        whole = training + to_train * profile_s + profiling
        return Left(seconds=whole if bound is None else min(bound, whole))
