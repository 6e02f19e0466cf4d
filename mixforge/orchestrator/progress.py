"""How far a search is: the value that its caller gets while it runs, and the one it gets at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mixforge.db.values import Best, Stage
from mixforge.evaluator.evaluation import Outcome
from mixforge.search_space.count import counted

Phase = Literal["starting", "training", "draining", "profiling", "stopping", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """One trial that a worker is at."""

    number: int
    name: str
    """A baseline's name; otherwise the origin, `random` or the sampler's name."""
    text: str
    """The architecture's canonical text."""
    stage: Stage
    attempt: int
    """1, or 2 where the first one gave nothing."""
    seconds: float
    """Since it was started."""
    task: str | None
    """The task it trains for; None, like the three below, until its first step is done."""
    step: int | None
    """Steps done, of all the tasks' trainings together."""
    steps: int | None
    loss: float | None
    """Nats per predicted token of the last batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Volumes:
    """Hypervolumes from one reference point: the worst of every objective among all finished trials, and a
    tenth.
    """

    search: float
    """Of what the sampler proposed."""
    random: float
    """Of the random arm."""
    search_matched: float
    """Mean over draws of as many search trials as the random arm has: a comparison at equal budget."""
    baselines: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """How long a search is likely to go on."""

    seconds: float
    at_most: bool = False
    """Whether it is what is left of the hours, of which nothing says yet whether the trials need all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a search stands now."""

    campaign: str
    phase: Phase
    baselines_done: int
    baselines: int
    trials_done: int
    """Finished trials, with whatever outcome; baselines apart."""
    trials: int | None
    """How many the campaign asks for; None where only its hours bound it."""
    outcomes: Mapping[Outcome, int]
    """Of all finished trials, baselines included."""
    reused: int
    """Trials answered by an evaluation that was stored."""
    waiting: int
    """Trained, and waiting for the machine to be idle to be profiled."""
    running: tuple[Running, ...]
    rejected: Mapping[str, int]
    """Proposals that never reached a worker, by reason."""
    best: tuple[Best, ...]
    """One per objective, in the campaign's order; fewer while nothing is finished."""
    front: int
    """Trials on the Pareto front, baselines included."""
    volumes: Volumes | None
    """None until both arms have a finished trial, or at once where a campaign has no two arms."""
    elapsed_s: float
    """Of this run."""
    spent_s: float
    """Of all runs of this campaign."""
    left: Left | None
    """None while there is nothing to estimate it from, and in a run that is stopping or has ended."""
    idle_share: float
    """The share of the workers' time so far in which they had nothing to do."""
    note: str | None = None
    """The last thing that went wrong, in a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a search ended, and where it left off."""

    why: Literal["trials", "hours", "exhausted", "interrupted"]
    """`exhausted`: the space has no architecture left that was not tried."""
    signal: int | None
    """The signal that interrupted it."""
    progress: Progress

    @property
    def sentence(self) -> str:
        """What a person is told, with the way on."""
        progress = self.progress
        done = (
            f"{counted(progress.trials_done, 'trial')} and {counted(progress.baselines_done, 'baseline')} "
            "are finished"
        )
        match self.why:
            case "trials":
                return f"{done}: all that the campaign asks for. Raise search.trials in its file to go on."
            case "hours":
                return f"{done}; the campaign's hours are spent. Raise search.hours in its file to go on."
            case "exhausted":
                reasons = ", ".join(f"{reason} {count}" for reason, count in progress.rejected.items())
                return (
                    f"{done}; no architecture within the limits was found that had not been tried. Draws were refused "
                    f"for: {reasons}. Widen the space in its file to go on."
                )
            case "interrupted":
                return f"{done} and stored. Run the same command again to go on from here."
