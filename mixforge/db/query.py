"""Questions to a store: a table of trials under a condition, and the front of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, select

from mixforge.db import encoding, rows, tables
from mixforge.db.condition import read_column, read_condition
from mixforge.db.front import directed, non_dominated
from mixforge.db.store import Store
from mixforge.db.values import Trial
from mixforge.db.views import trials as view
from mixforge.evaluator.evaluation import Outcome

Cell = str | int | float | bool | datetime | None
MOST_MEMBERS = 500
"""How many trials are fetched with one statement; databases bound the values of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A table: names of columns, and rows of their values."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def ask(
    store: Store,
    *,
    where: str | None = None,
    order: str | None = None,
    columns: Sequence[str] = ("campaign", "number", "digest", "architecture", "outcome"),
    limit: int | None = None,
) -> Answer:
    """The trials that a condition selects, in an order, at most `limit` of them.

    order: a column's name, with `-` before it for the largest first; what was not measured comes last.
    Without an order: by campaign and number. Raises QueryError (a ValueError) for what cannot be read.
    """
    names = tuple(read_column(name) for name in columns)
    if not names:
        raise ValueError("no column was asked for; name at least one")
    if limit is not None and limit < 0:
        raise ValueError(f"limit {limit} is not a number of rows from 0 up")
    query = select(*(view.c[name] for name in names)).order_by(*_order(order))
    with store.database.read() as connection:
        found = connection.execute(_filtered(query, where, None).limit(limit))
        return Answer(columns=names, rows=tuple(tuple(row) for row in found))


def front(
    store: Store, figures: Sequence[str], *, where: str | None = None, campaign: str | None = None
) -> tuple[Trial, ...]:
    """The ok trials that no other one beats in the named figures, best in the first figure first.

    FIGURES says which way is better. Of trials with the same architecture and the same figures only the first
    is given. Raises ValueError for an unknown figure or a condition that cannot be read.
    """
    if not figures:
        raise ValueError("a front needs at least one figure")
    directed((), figures)
    query = select(view.c.id, view.c.digest, *(view.c[name] for name in figures))
    query = _filtered(query, where, campaign).where(view.c.outcome == Outcome.ok.value).order_by(view.c.id)
    with store.database.read() as connection:
        found = connection.execute(query).all()
        points = directed(
            ([math.nan if value is None else value for value in row[2:]] for row in found), figures
        )
        on_front = [index for index, is_on in enumerate(non_dominated(points)) if is_on]
        once = {(found[index].digest, *points[index]): index for index in reversed(on_front)}
        best_first = sorted(once.values(), key=lambda index: tuple(points[index]))
        members: dict[int, Trial] = {}
        for start in range(0, len(best_first), MOST_MEMBERS):
            keys = [found[index].id for index in best_first[start : start + MOST_MEMBERS]]
            fetched = connection.execute(rows.trials().where(tables.trial.c.id.in_(keys))).mappings()
            members |= {row["id"]: encoding.trial_from(row) for row in fetched}
    return tuple(members[found[index].id] for index in best_first)


def _filtered(query: Select[Any], where: str | None, campaign: str | None) -> Select[Any]:
    if where is not None and where.strip():
        query = query.where(read_condition(where))
    return query if campaign is None else query.where(view.c.campaign == campaign)


def _order(order: str | None) -> tuple[ColumnElement[object], ...]:
    if order is None:
        return (view.c.id,)
    column = view.c[read_column(order.removeprefix("-"))]
    return (column.desc() if order.startswith("-") else column.asc()).nulls_last(), view.c.id
