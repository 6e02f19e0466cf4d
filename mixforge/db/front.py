"""The Pareto front: which points no other point beats.

Points are rows of M objectives, all to be made small; `directed` turns larger-is-better ones round. A point with a
NaN was not measured: it is on no front and beats none. Equal points do not beat one another, so all of them are on
the front together. In plain Python: it finds the front of 10,000 points sooner than NumPy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import le

from mixforge.evaluator.evaluation import FIGURES

Point = tuple[float, ...]


def directed(rows: Iterable[Sequence[float]], figures: Sequence[str]) -> list[Point]:
    """Values of the named figures as points where smaller is better. Raises ValueError for an unknown figure."""
    for name in figures:
        if name not in FIGURES:
            raise ValueError(f"{name!r} is not a figure; the figures are {', '.join(FIGURES)}")
    signs = [1.0 if FIGURES[name].better == "lower" else -1.0 for name in figures]
    return [tuple(sign * value for sign, value in zip(signs, row, strict=True)) for row in rows]


def non_dominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Marks the points that no other point beats: at least as good everywhere and better somewhere."""
    on_front = [False] * len(points)
    measured = [index for index, point in enumerate(points) if all(value == value for value in point)]
    # In this order a point can be beaten only by one before it.
    measured.sort(key=lambda index: tuple(points[index]))
    front: list[Sequence[float]] = []
    for index in measured:
        point = points[index]
        # Of two objectives, the latest member has the best second one so far.
        rivals = front[-1:] if len(point) <= 2 else front
        for place, rival in enumerate(rivals):
            if all(map(le, rival, point)):
                on_front[index] = list(rival) == list(point)
                # What beat one point is asked first about the next.
                if place:
                    front.insert(0, front.pop(place))
                break
        else:
            front.append(point)
            on_front[index] = True
    return on_front
