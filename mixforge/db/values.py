"""What the store takes and gives: frozen values, no rows and no sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from mixforge.evaluator.evaluation import Evaluation, Outcome, Profile

if TYPE_CHECKING:
    from mixforge.search_space.architecture import Architecture

Stage = Literal["train", "profile"]


class State(StrEnum):
    """Where a trial stands. Only `finished` has an outcome, and a finished trial is never changed."""

    proposed = "proposed"
    training = "training"
    trained = "trained"
    profiling = "profiling"
    finished = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCampaign:
    """A campaign as it was first run: its file verbatim."""

    id: int
    name: str
    digest: str
    text: str
    seed: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArchitecture:
    """One architecture under its digest."""

    digest: str
    text: str
    """Canonical text, with the shortest aliases."""
    canonical: str
    """Canonical JSON, which the digest is taken of."""
    width: int
    depth: int
    """Layers, each repeat and reuse counted."""
    mixers: tuple[str, ...]
    """Names of the mixers in it, sorted, each once."""


def describe(architecture: Architecture) -> StoredArchitecture:
    """What is stored of an architecture."""
    return StoredArchitecture(
        digest=architecture.digest,
        text=str(architecture),
        canonical=architecture.canonical_json,
        width=architecture.width,
        depth=architecture.depth,
        mixers=tuple(sorted(architecture.mixers)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer of a derivation: the choice's name, the option's index, its text and how many there were."""

    name: str
    index: int
    option: str
    options: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a sampler proposes, before anything ran."""

    number: int
    """Within the campaign, from 0, each once."""
    architecture: StoredArchitecture
    budget: str
    """Digest of the budget."""
    origin: str
    """`baseline`, `random` or the sampler's name."""
    choices: tuple[Choice, ...] = ()
    attributes: Mapping[str, object] = field(default_factory=dict)
    """The sampler's own notes, JSON values only. They are given back as they were."""
    parents: tuple[str, ...] = ()
    """Digests of the architectures it was made from, at most two."""
    operator: str | None = None
    """How it was made from them: `mutate`, `cross`."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Architectures drawn and refused before this one, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One proposal and what became of it."""

    id: int
    campaign: int
    number: int
    digest: str
    """The architecture's."""
    text: str
    """The architecture's canonical text."""
    budget: str
    origin: str
    parents: tuple[str, ...]
    operator: str | None
    state: State
    outcome: Outcome | None
    reason: str | None
    reused: bool
    """Whether a stored evaluation answered it, so that nothing was trained."""
    choices: tuple[Choice, ...]
    attributes: Mapping[str, object]
    rejected: Mapping[str, int]
    proposed_at: datetime
    finished_at: datetime | None
    figures: Mapping[str, float]
    """By name in FIGURES; only what was measured."""
    spreads: Mapping[str, float]
    """Interquartile ranges, by the figure's name; only of latencies that were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try at one stage of one trial."""

    token: int
    trial: int
    """The trial's id."""
    stage: Stage
    worker: str
    started_at: datetime
    ended_at: datetime | None
    seconds: float | None
    """By the worker's monotonic clock; None where it was abandoned."""
    outcome: Outcome | None
    """None while it is open, and where it was abandoned or superseded."""
    reason: str | None
    trace: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best value of one figure among the ok trials of a campaign."""

    figure: str
    value: float
    number: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How many trials of a campaign share an origin, a state and an outcome."""

    origin: str
    state: State
    outcome: Outcome | None
    trials: int
    reused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where a campaign stands."""

    campaign: StoredCampaign
    counts: tuple[Count, ...]
    spent_s: float
    """Wall time of all its runs."""
    train_s: float
    """Worker time of finished attempts at training."""
    profile_s: float
    lost_attempts: int
    """Attempts that were abandoned or superseded, and so run again."""
    open_attempts: int
    rejected: Mapping[str, int]
    """Architectures drawn and refused, by reason."""
    best: tuple[Best, ...]

    def trials(self, *, state: State | None = None, outcome: Outcome | None = None) -> int:
        return sum(
            count.trials
            for count in self.counts
            if (state is None or count.state == state) and (outcome is None or count.outcome == outcome)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dossier:
    """Everything that is stored of one architecture."""

    architecture: StoredArchitecture
    evaluations: tuple[tuple[str, Evaluation], ...]
    """Each with the digest of its budget."""
    profiles: tuple[Profile, ...]
    """In the order they were measured."""
    trials: tuple[tuple[str, Trial], ...]
    """Each with the name of its campaign."""
    attempts: tuple[Attempt, ...]
