"""Hypervolume: how much of the space below a reference point a set of points beats, and its growth by trial.

    hv(P) = volume of the union over p in P of the boxes [p, reference]
    hv(P + q) = hv(P) + box(q) - hv({max(p, q) for p in P})

Exact, by the second line: points are taken from the worst in the last objective to the best, so that in the
limited set the last objective is constant and the problem loses one dimension.
Source: L. While, L. Bradstreet, L. Barone, A Fast Way of Calculating Exact Hypervolumes (WFG),
IEEE Transactions on Evolutionary Computation 16(1), 2012.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixforge.db.front import non_dominated

Points = NDArray[np.float64]


def reference_point(points_NM: Points) -> Points:
    """The worst value of each objective, and a tenth of the objective's range beyond it.

    Sets that are compared need one reference point: take it of all their points together.
    Raises ValueError where no point is finite.
    """
    finite = points_NM[np.isfinite(points_NM).all(axis=1)]
    if not len(finite):
        raise ValueError("there is no measured point to take a reference point of")
    worst, best = finite.max(axis=0), finite.min(axis=0)
    margin = 0.1 * (worst - best)
    # Where all points agree, a margin of nothing would make every volume 0.
    reference_M: Points = worst + np.where(margin > 0, margin, np.maximum(0.1 * np.abs(worst), 1e-12))
    return reference_M


def hypervolume(points_NM: Points, reference_M: Points) -> float:
    """Volume beaten by points where smaller is better; one beyond the reference, or NaN, beats nothing."""
    inside = points_NM[(points_NM < reference_M).all(axis=1)]
    return _volume(_front(inside), reference_M)


def hypervolume_history(points_NM: Points, reference_M: Points) -> list[float]:
    """The hypervolume of the first 1, 2, ..., N points."""
    front = np.empty((0, len(reference_M)))
    volume, history = 0.0, []
    for point in points_NM:
        if (point < reference_M).all() and not (front <= point).all(axis=1).any():
            volume += float(np.prod(reference_M - point)) - hypervolume(np.maximum(front, point), reference_M)
            front = np.vstack([front[(front < point).any(axis=1)], point])
        history.append(volume)
    return history


def _volume(front_NM: Points, reference_M: Points) -> float:
    """Of points that do not beat one another and are all better than the reference."""
    if not len(front_NM):
        return 0.0
    if front_NM.shape[1] == 1:
        return float((reference_M - front_NM).max())
    if front_NM.shape[1] == 2:
        front = front_NM[np.argsort(front_NM[:, 0])]
        heights = np.concatenate([[reference_M[1]], front[:-1, 1]]) - front[:, 1]
        return float(((reference_M[0] - front[:, 0]) * heights).sum())
    front = front_NM[np.argsort(-front_NM[:, -1], kind="stable")]
    base, total = reference_M[:-1], 0.0
    for index, point in enumerate(front):
        limited = np.maximum(front[index + 1 :, :-1], point[:-1])
        area = float(np.prod(base - point[:-1])) - _volume(_distinct(_front(limited)), base)
        total += area * float(reference_M[-1] - point[-1])
    return total


def _front(points_NM: Points) -> Points:
    front: Points = points_NM[np.array(non_dominated(points_NM.tolist()), dtype=bool)]
    return front


def _distinct(points_NM: Points) -> Points:
    return np.unique(points_NM, axis=0)
