"""What is known of one campaign, and of one architecture, at a glance."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sqlalchemy import Connection, func, select

from mixforge.db import encoding, rows, tables
from mixforge.db.store import Store
from mixforge.db.values import Best, Count, Dossier, State, Status, StoredArchitecture, StoredCampaign
from mixforge.evaluator.evaluation import FIGURES, Outcome

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

SHORTEST_PREFIX = 4
MOST_CANDIDATES = 8


def status(store: Store, campaign: StoredCampaign) -> Status:
    """Counts, time spent, rejections and best figures of a campaign."""
    with store.database.read() as connection:
        seconds = _attempt_seconds(connection, campaign.id)
        open_attempts, lost = _unrecorded_attempts(connection, campaign.id)
        return Status(
            campaign=campaign,
            counts=_counts(connection, campaign.id),
            spent_s=rows.spent_s(connection, campaign.id),
            train_s=seconds.get("train", 0.0),
            profile_s=seconds.get("profile", 0.0),
            open_attempts=open_attempts,
            lost_attempts=lost,
            rejected=_rejected(connection, campaign.id),
            best=tuple(
                best for name in FIGURES if (best := _best(connection, campaign.id, name)) is not None
            ),
        )


def find(store: Store, prefix: str) -> StoredArchitecture:
    """The architecture whose digest begins so.

    Raises ValueError where there is none or more than one, or the prefix is too short or no digest.
    """
    digest = prefix.strip().lower()
    if len(digest) < SHORTEST_PREFIX or len(digest) > 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(
            f"{prefix!r} is not a digest; give its first {SHORTEST_PREFIX} or more hexadecimal digits"
        )
    table = tables.architecture
    query = select(table).where(table.c.digest.startswith(digest)).order_by(table.c.digest)
    with store.database.read() as connection:
        rows_found = connection.execute(query.limit(MOST_CANDIDATES)).mappings()
        found = [encoding.architecture_from(row) for row in rows_found]
    if not found:
        raise ValueError(
            f"no architecture in {store.database.name} has a digest that begins with {digest}; "
            "`mixforge query` lists those there are"
        )
    if len(found) > 1:
        candidates = "\n".join(f"    {each.digest[:16]}  {each.text}" for each in found)
        raise ValueError(f"{digest} begins more than one digest; give more of it:\n{candidates}")
    return found[0]


def dossier(store: Store, architecture: StoredArchitecture) -> Dossier:
    """Everything that is stored of an architecture: evaluations, profiles, trials and attempts."""
    digest = architecture.digest
    trial, attempt, campaign = tables.trial, tables.attempt, tables.campaign
    with store.database.read() as connection:
        measured = {}
        for table in (tables.evaluation, tables.profile):
            query = select(table).where(table.c.architecture == digest).order_by(table.c.id)
            measured[table.name] = [dict(row) for row in connection.execute(query).mappings()]
        used = {row["environment"] for found in measured.values() for row in found}
        places = {key: rows.environment(connection, key) for key in used}
        query = (
            rows.trials().add_columns(campaign.c.name).join(campaign, campaign.c.id == trial.c.campaign_id)
        )
        trials = connection.execute(
            query.where(trial.c.architecture == digest).order_by(trial.c.id)
        ).mappings()
        attempts = connection.execute(
            select(attempt)
            .join(trial, trial.c.id == attempt.c.trial_id)
            .where(trial.c.architecture == digest)
            .order_by(attempt.c.id)
        ).mappings()
        return Dossier(
            architecture=architecture,
            evaluations=tuple(
                (row["budget"], encoding.evaluation_from(row, places[row["environment"]]))
                for row in measured["evaluation"]
            ),
            profiles=tuple(
                encoding.profile_from(row, places[row["environment"]]) for row in measured["profile"]
            ),
            trials=tuple((row["name"], encoding.trial_from(row)) for row in trials),
            attempts=tuple(encoding.attempt_from(row) for row in attempts),
        )


def _counts(connection: Connection, campaign: int) -> tuple[Count, ...]:
    trial = tables.trial
    group = (trial.c.origin, trial.c.state, trial.c.outcome, trial.c.reused)
    query = (
        select(*group, func.count().label("trials")).where(trial.c.campaign_id == campaign).group_by(*group)
    )
    trials: Counter[tuple[str, str, str | None]] = Counter()
    reused: Counter[tuple[str, str, str | None]] = Counter()
    for row in connection.execute(query.group_by(*group)):
        key = (row.origin, row.state, row.outcome)
        trials[key] += row.trials
        reused[key] += row.trials if row.reused else 0
    return tuple(
        Count(
            origin=origin,
            state=State(state),
            outcome=None if outcome is None else Outcome(outcome),
            trials=trials[origin, state, outcome],
            reused=reused[origin, state, outcome],
        )
        for origin, state, outcome in sorted(trials, key=lambda key: tuple(part or "" for part in key))
    )


def _attempt_seconds(connection: Connection, campaign: int) -> dict[str, float]:
    attempt = tables.attempt
    query = select(attempt.c.stage, func.sum(attempt.c.seconds).label("seconds"))
    query = query.where(_attempts_of(campaign), attempt.c.seconds.is_not(None)).group_by(attempt.c.stage)
    return {row.stage: float(row.seconds) for row in connection.execute(query)}


def _unrecorded_attempts(connection: Connection, campaign: int) -> tuple[int, int]:
    """How many attempts are open, and how many ended without having recorded anything."""
    attempt = tables.attempt
    query = select(func.count(), func.count(attempt.c.ended_at))
    found = connection.execute(query.where(_attempts_of(campaign), attempt.c.outcome.is_(None))).one()
    return found[0] - found[1], found[1]


def _attempts_of(campaign: int) -> ColumnElement[bool]:
    trials = select(tables.trial.c.id).where(tables.trial.c.campaign_id == campaign)
    return tables.attempt.c.trial_id.in_(trials)


def _rejected(connection: Connection, campaign: int) -> dict[str, int]:
    total: Counter[str] = Counter()
    for rejected in connection.scalars(
        select(tables.trial.c.rejected).where(tables.trial.c.campaign_id == campaign)
    ):
        total.update(rejected)
    return dict(total.most_common())


def _best(connection: Connection, campaign: int, figure: str) -> Best | None:
    trial = tables.trial
    column = trial.c[figure]
    query = (
        select(column.label("value"), trial.c.number, trial.c.architecture)
        .where(trial.c.campaign_id == campaign, trial.c.outcome == Outcome.ok.value, column.is_not(None))
        .order_by(column if FIGURES[figure].better == "lower" else column.desc(), trial.c.number)
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    return (
        None
        if row is None
        else Best(figure=figure, value=row.value, number=row.number, digest=row.architecture)
    )
