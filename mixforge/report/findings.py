"""What a report shows of one campaign: its candidates by role and the growth of its hypervolume."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixforge.db.front import Point, directed, non_dominated
from mixforge.db.hypervolume import hypervolume_history, reference_point
from mixforge.db.results import Results
from mixforge.db.values import State, Status, StoredCampaign, Trial
from mixforge.evaluator.evaluation import FIGURES, Environment, Evaluation, Outcome
from mixforge.search_space.architecture import LayerEntry
from mixforge.search_space.notation import parse

Arm = Literal["baseline", "random", "search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One architecture that was measured in every objective."""

    trial: Trial
    arm: Arm
    on_front: bool
    name: str | None
    """A baseline's name."""

    @property
    def label(self) -> str:
        """The name, or the digest's first digits."""
        return self.name or self.trial.digest[:8]

    @property
    def layers(self) -> tuple[LayerEntry, ...]:
        return parse(self.trial.text).layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The hypervolume of one arm of the search after each of its trials."""

    arm: Arm
    volumes: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """One campaign, ready to be drawn."""

    campaign: StoredCampaign
    status: Status
    objectives: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    """Each architecture once, by the number of its first trial."""
    failed: Mapping[str, int]
    """Finished trials that have no figures, by outcome."""
    growth: tuple[Growth, ...]
    baseline_volume: float | None
    """The hypervolume of the baselines alone, with the same reference point."""
    evaluations: Mapping[str, Evaluation]
    """Of the front's members and the baselines, by digest: their learning curves."""
    environment: Environment | None
    """Where they were measured."""

    @property
    def front(self) -> tuple[Candidate, ...]:
        """Best in the first objective first."""
        first = self.objectives[0]
        sign = 1 if FIGURES[first].better == "lower" else -1
        members = (candidate for candidate in self.candidates if candidate.on_front)
        return tuple(sorted(members, key=lambda each: sign * each.trial.figures[first]))

    @property
    def baselines(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.arm == "baseline")


def gather(results: Results, campaign: str, objectives: Sequence[str] | None = None) -> Findings:
    """Read what a report needs; the objectives are those of the campaign's file unless they are given.

    Raises ValueError where there is no such campaign, an objective is no figure, or nothing was measured.
    """
    status = results.status(campaign)
    trials = results.trials(campaign)
    file = tomllib.loads(status.campaign.text)
    steered = tuple(objectives or file["objectives"])
    names = _baseline_names(trials, file.get("baselines", []))
    shown = {each.trial.digest for each in candidates(trials, steered, names) if _is_drawn(each)}
    budgets = {trial.digest: trial.budget for trial in trials}
    evaluations = {
        digest: evaluation
        for digest in sorted(shown)
        for budget, evaluation in results.show(digest).evaluations
        if budget == budgets[digest]
    }
    return findings(status, trials, steered, names=names, evaluations=evaluations)


def _baseline_names(trials: Sequence[Trial], given: Sequence[str]) -> dict[str, str]:
    """Baselines are a campaign's first trials, in the order of its file; an expression is no name."""
    baselines = [trial for trial in trials if _arm(trial) == "baseline" and trial.number < len(given)]
    return {trial.digest: given[trial.number] for trial in baselines if "(" not in given[trial.number]}


def findings(
    status: Status,
    trials: Sequence[Trial],
    objectives: Sequence[str],
    *,
    names: Mapping[str, str],
    evaluations: Mapping[str, Evaluation],
) -> Findings:
    """Put a campaign's trials in their roles. Raises ValueError where there is nothing to show."""
    found = candidates(trials, objectives, names)
    if not found:
        raise ValueError(
            f"campaign {status.campaign.name!r} has no trial yet with figures for {', '.join(objectives)}; "
            "let it search longer"
        )
    points = {each.trial.digest: _point(each.trial, objectives) for each in found}
    reference = reference_point(np.array(list(points.values())))
    nothing = np.full(len(objectives), np.nan)
    arms: dict[Arm, list[Trial]] = {"search": [], "random": [], "baseline": []}
    for trial in trials:
        if trial.state is State.finished:
            arms[_arm(trial)].append(trial)
    histories = {
        arm: hypervolume_history(np.array([points.get(trial.digest, nothing) for trial in of_arm]), reference)
        for arm, of_arm in arms.items()
        if of_arm
    }
    failed = Counter(str(trial.outcome) for trial in trials if trial.state is State.finished)
    failed.pop(str(Outcome.ok), None)
    seen = next(iter(evaluations.values()), None)
    return Findings(
        campaign=status.campaign,
        status=status,
        objectives=tuple(objectives),
        candidates=found,
        failed=dict(failed.most_common()),
        growth=tuple(
            Growth(arm=arm, volumes=tuple(volumes)) for arm, volumes in histories.items() if arm != "baseline"
        ),
        baseline_volume=histories["baseline"][-1] if "baseline" in histories else None,
        evaluations=evaluations,
        environment=None if seen is None else seen.environment,
    )


def candidates(
    trials: Sequence[Trial], objectives: Sequence[str], names: Mapping[str, str]
) -> tuple[Candidate, ...]:
    """Architectures that were measured in every objective, each once, by its first trial."""
    measured: dict[str, Trial] = {}
    baselines = {trial.digest for trial in trials if _arm(trial) == "baseline"}
    for trial in trials:
        if trial.outcome is Outcome.ok and all(name in trial.figures for name in objectives):
            measured.setdefault(trial.digest, trial)
    if not measured:
        return ()
    front = non_dominated([_point(trial, objectives) for trial in measured.values()])
    return tuple(
        Candidate(
            trial=trial,
            arm="baseline" if digest in baselines else _arm(trial),
            on_front=on_front,
            name=names.get(digest),
        )
        for (digest, trial), on_front in zip(measured.items(), front, strict=True)
    )


def _point(trial: Trial, objectives: Sequence[str]) -> Point:
    return directed([[trial.figures[name] for name in objectives]], objectives)[0]


def _arm(trial: Trial) -> Arm:
    if trial.origin == "baseline":
        return "baseline"
    return "random" if trial.origin == "random" else "search"


def _is_drawn(candidate: Candidate) -> bool:
    return candidate.on_front or candidate.arm == "baseline"
