"""What has been found so far, as the figures that a running search shows: best values, front and
hypervolumes.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixforge.db.front import directed, non_dominated
from mixforge.db.hypervolume import Points, hypervolume, reference_point
from mixforge.db.values import Best, Trial
from mixforge.evaluator.evaluation import Figure, Outcome
from mixforge.orchestrator.progress import Volumes
from mixforge.orchestrator.study import BASELINE, RANDOM

# Draws of a part of the search trials as large as the random arm; their mean moves by a few parts in a
# hundred.
_DRAWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What the finished trials of a campaign come to."""

    best: tuple[Best, ...]
    """One per objective, in their order, as far as there is one."""
    front: int
    """Trials that no other beats."""
    volumes: Volumes | None
    """None until both arms have a trial with all objectives."""


def outlook(trials: Sequence[Trial], objectives: Sequence[Figure]) -> Outlook:
    """Of finished trials, whatever their outcome; only those that ended well count."""
    names = [figure.name for figure in objectives]
    well = [trial for trial in trials if trial.outcome is Outcome.ok]
    complete = [trial for trial in well if all(name in trial.figures for name in names)]
    best = tuple(found for figure in objectives if (found := _best(well, figure)) is not None)
    if not complete:
        return Outlook(best=best, front=0, volumes=None)
    points = directed([[trial.figures[name] for name in names] for trial in complete], names)
    arms = np.array([_arm(trial) for trial in complete])
    return Outlook(best=best, front=sum(non_dominated(points)), volumes=_volumes(np.array(points), arms))


def _best(trials: Sequence[Trial], figure: Figure) -> Best | None:
    sign = 1.0 if figure.better == "lower" else -1.0
    having = [trial for trial in trials if figure.name in trial.figures]
    if not having:
        return None
    trial = min(having, key=lambda trial: sign * trial.figures[figure.name])
    value = trial.figures[figure.name]
    return Best(figure=figure.name, value=value, number=trial.number, digest=trial.digest)


def _volumes(points_NM: Points, arms_N: NDArray[np.str_]) -> Volumes | None:
    search, chance = points_NM[arms_N == "search"], points_NM[arms_N == RANDOM]
    if not len(search) or not len(chance):
        return None
    reference = reference_point(points_NM)
    return Volumes(
        search=hypervolume(search, reference),
        random=hypervolume(chance, reference),
        search_matched=_matched(search, len(chance), reference),
        baselines=hypervolume(points_NM[arms_N == BASELINE], reference),
    )


def _arm(trial: Trial) -> str:
    return trial.origin if trial.origin in (BASELINE, RANDOM) else "search"


def _matched(points_NM: Points, size: int, reference_M: Points) -> float:
    """Mean hypervolume of `size` of the points, over a few draws that are the same every time."""
    if size >= len(points_NM):
        return hypervolume(points_NM, reference_M)
    draw = random.Random(len(points_NM))
    return statistics.fmean(
        hypervolume(points_NM[draw.sample(range(len(points_NM)), size)], reference_M) for _ in range(_DRAWS)
    )
