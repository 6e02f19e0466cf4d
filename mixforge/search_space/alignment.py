"""Two sequences side by side: the cheapest way to make one the other by changes, additions and removals.

Source: Wagner and Fischer 1974, The string-to-string correction problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def edit_cost(
    first: Sequence[Item],
    second: Sequence[Item],
    change: Callable[[Item, Item], float],
    size: Callable[[Item], float],
) -> float:
    """The cost of the cheapest alignment. `change` must be a metric, with `size` the distance from nothing.

    Equal ends are matched first, which is always right under a metric. Items are compared by identity there.
    """
    begin, end = 0, 0
    shorter = min(len(first), len(second))
    while begin < shorter and first[begin] is second[begin]:
        begin += 1
    while end < shorter - begin and first[-1 - end] is second[-1 - end]:
        end += 1
    rows, columns = first[begin : len(first) - end], second[begin : len(second) - end]
    return _table(rows, columns, change, size)[-1][-1]


def align(
    first: Sequence[Item],
    second: Sequence[Item],
    change: Callable[[Item, Item], float],
    size: Callable[[Item], float],
) -> list[tuple[int | None, int | None]]:
    """The cheapest alignment, as pairs of indices in order; None stands for nothing. Ties prefer a change."""
    table = _table(first, second, change, size)
    pairs: list[tuple[int | None, int | None]] = []
    row, column = len(first), len(second)
    while row or column:
        here = table[row][column]
        if row and column and here == table[row - 1][column - 1] + change(first[row - 1], second[column - 1]):
            row, column = row - 1, column - 1
            pairs.append((row, column))
        elif row and here == table[row - 1][column] + size(first[row - 1]):
            row -= 1
            pairs.append((row, None))
        else:
            column -= 1
            pairs.append((None, column))
    return pairs[::-1]


def _table(
    first: Sequence[Item],
    second: Sequence[Item],
    change: Callable[[Item, Item], float],
    size: Callable[[Item], float],
) -> list[list[float]]:
    """The cost of every pair of beginnings."""
    sizes = [size(item) for item in second]
    above: list[float] = [0]
    for gap in sizes:
        above.append(above[-1] + gap)
    table = [above]
    for mine in first:
        gone = size(mine)
        left = above[0] + gone
        row = [left]
        corner = above[0]
        for place, yours in enumerate(second, 1):
            over = above[place]
            best = corner + change(mine, yours)
            if over + gone < best:
                best = over + gone
            if left + sizes[place - 1] < best:
                best = left + sizes[place - 1]
            row.append(best)
            left, corner = best, over
        table.append(row)
        above = row
    return table
