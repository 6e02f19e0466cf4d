"""Single rows of the tables, written and found inside a caller's transaction.

Statements are built once and given their values when they run: building one costs SQLAlchemy several times what
SQLite takes to run it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from sqlalchemy import BindParameter, Connection, Insert, Select, Table, bindparam, insert, select, update
from sqlalchemy.dialects import sqlite

from mixforge.db import encoding, tables
from mixforge.db.values import Trial
from mixforge.evaluator.evaluation import Environment, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from typing import Any

    from mixforge.db.encoding import Values


def add(connection: Connection, table: Table, values: Values) -> int:
    """Adds a row and gives its number."""
    key = connection.execute(insert(table), values).inserted_primary_key
    assert key is not None
    return int(key[0])


def add_once(connection: Connection, table: Table, values: Values, identity: str) -> None:
    """Adds a row where there is none with the same value in the column `identity`."""
    connection.execute(_insert_once(connection.dialect.name, table, identity), values)


@lru_cache(maxsize=32)
def _insert_once(name: str, table: Table, identity: str) -> Insert:
    # The two dialects agree on the clause, but each has its own class for it. The other one's module is large, and a
    # question to a file should not wait for it.
    if name == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing(index_elements=[identity])
    from sqlalchemy.dialects import postgresql

    return postgresql.insert(table).on_conflict_do_nothing(index_elements=[identity])


def add_environment(connection: Connection, environment: Environment) -> str:
    """The digest of an environment, stored where it is new."""
    values = encoding.environment_values(environment)
    add_once(connection, tables.environment, values, "digest")
    return str(values["digest"])


def add_profile(
    connection: Connection, values: Values, environment: Environment, identity: Values, now: datetime
) -> None:
    measured = {"environment": add_environment(connection, environment), "recorded_at": now}
    add(connection, tables.profile, {**values, **identity, **measured})


def environment(connection: Connection, digest: str) -> Mapping[str, Any]:
    query = select(tables.environment.c.details).where(tables.environment.c.digest == digest)
    return dict(connection.scalars(query).one())


_EVALUATION = select(tables.evaluation).where(
    tables.evaluation.c.architecture == bindparam("one_architecture"),
    tables.evaluation.c.budget == bindparam("one_budget"),
)


def find_evaluation(connection: Connection, architecture: str, budget: str) -> Values | None:
    key = {"one_architecture": architecture, "one_budget": budget}
    row = connection.execute(_EVALUATION, key).mappings().one_or_none()
    return None if row is None else dict(row)


_CAMPAIGN = (
    select(tables.trial.c.campaign_id)
    .join(tables.attempt, tables.attempt.c.trial_id == tables.trial.c.id)
    .where(tables.attempt.c.id == bindparam("key"))
)


def campaign_of(connection: Connection, attempt: int | None) -> int | None:
    """The campaign that made an attempt; None for what was stored without one."""
    return None if attempt is None else connection.scalars(_CAMPAIGN, {"key": attempt}).one()


_REPLACED = update(tables.evaluation).where(tables.evaluation.c.id == bindparam("key"))


def replace_evaluation(connection: Connection, evaluation: int, values: Values) -> None:
    connection.execute(_REPLACED, {"key": evaluation, **values})


def find_profile(
    connection: Connection, architecture: str, budget: str, environment: Environment
) -> Values | None:
    """The newest ok profile on the same device of the same host under the same torch."""
    profile, place = tables.profile, tables.environment
    query = (
        select(profile)
        .join(place, place.c.digest == profile.c.environment)
        .where(
            profile.c.architecture == architecture,
            profile.c.budget == budget,
            profile.c.outcome == Outcome.ok.value,
            place.c.device == environment.device,
            place.c.host == environment.host,
            place.c.torch == environment.torch,
        )
        .order_by(profile.c.id.desc())
        .limit(1)
    )
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else dict(row)


_KEY: BindParameter[int] = bindparam("key")
_LOCKED_TRIAL = select(tables.trial).where(tables.trial.c.id == _KEY).with_for_update()
_CHANGED_TRIAL = update(tables.trial).where(tables.trial.c.id == _KEY)
_ENDED_ATTEMPT = update(tables.attempt).where(
    tables.attempt.c.id == _KEY, tables.attempt.c.ended_at.is_(None)
)


def lock_trial(connection: Connection, trial: int) -> Values:
    """A trial's row, which no other transaction changes before this one ends."""
    row = connection.execute(_LOCKED_TRIAL, {"key": trial}).mappings().one_or_none()
    if row is None:
        raise ValueError(f"there is no trial with the id {trial}")
    return dict(row)


def set_trial(connection: Connection, trial: int, values: Values) -> None:
    connection.execute(_CHANGED_TRIAL, {"key": trial, **values})


def end_attempt(connection: Connection, token: int, values: Values) -> None:
    """Completes an attempt that is open; one that has ended stays as it is."""
    connection.execute(_ENDED_ATTEMPT, {"key": token, **values})


def trials() -> Select[Any]:
    """Every trial's columns with its architecture's text."""
    architecture = tables.architecture
    return select(tables.trial, architecture.c.text).join(
        architecture, architecture.c.digest == tables.trial.c.architecture
    )


_TRIAL = trials().where(tables.trial.c.id == _KEY)


def trial(connection: Connection, key: int) -> Trial:
    row = connection.execute(_TRIAL, {"key": key}).mappings().one_or_none()
    if row is None:
        raise ValueError(f"there is no trial with the id {key}")
    return encoding.trial_from(row)


def spent_s(connection: Connection, campaign: int) -> float:
    """Wall time of all runs of a campaign."""
    seconds = connection.scalars(select(tables.run.c.seconds).where(tables.run.c.campaign_id == campaign))
    return float(sum(seconds))
