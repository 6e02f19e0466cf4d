"""The Pareto front: which points no other point beats.

Points are rows of an array [N, M] with M objectives, all to be made small; `directed` turns larger-is-better
ones round. A point with a NaN was not measured: it is on no front and beats none.
Equal points do not beat one another, so all of them are on the front together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mixforge.evaluator.evaluation import FIGURES

Points = NDArray[np.float64]


def directed(values_NM: Points, figures: Sequence[str]) -> Points:
    """Values of the named figures as points where smaller is better. Raises ValueError for an unknown one."""
    for name in figures:
        if name not in FIGURES:
            raise ValueError(f"{name!r} is not a figure; the figures are {', '.join(FIGURES)}")
    signs = np.array([1.0 if FIGURES[name].better == "lower" else -1.0 for name in figures])
    points_NM: Points = np.asarray(values_NM, dtype=np.float64) * signs
    return points_NM


def non_dominated(points_NM: Points) -> NDArray[np.bool_]:
    """Marks the points that no other point beats: at least as good everywhere and better somewhere."""
    front = np.zeros(len(points_NM), dtype=bool)
    left = np.flatnonzero(~np.isnan(points_NM).any(axis=1))
    # In this order a point can be beaten only by one before it.
    left = left[np.lexsort(points_NM[left].T[::-1])]
    while len(left):
        best = points_NM[left[0]]
        equal = (points_NM[left] == best).all(axis=1)
        front[left[equal]] = True
        left = left[(points_NM[left] < best).any(axis=1)]
    return front


def ranks(points_NM: Points) -> NDArray[np.int64]:
    """For each point the number of fronts to peel off before it is on one; unmeasured points come last."""
    rank = np.zeros(len(points_NM), dtype=np.int64)
    left = np.flatnonzero(~np.isnan(points_NM).any(axis=1))
    peeled = 0
    while len(left):
        front = non_dominated(points_NM[left])
        rank[left[front]] = peeled
        left = left[~front]
        peeled += 1
    rank[np.isnan(points_NM).any(axis=1)] = peeled
    return rank
