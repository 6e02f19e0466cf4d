"""The store: what a campaign proposed, tried and measured goes in and comes out as values.

A trial is claimed with a fencing token, and only the holder of its newest token may record. Every method is
one transaction: it is stored whole or not at all, and once the method has returned it survives the process.
Nothing is deleted, and a finished trial is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from mixforge.db import encoding, rows, tables, transitions
from mixforge.db.connection import Database, Mode, StoreError
from mixforge.db.schema import prepare
from mixforge.db.transitions import StaleToken as StaleToken
from mixforge.db.values import (
    Attempt,
    Proposal,
    Stage,
    State,
    StoredArchitecture,
    StoredCampaign,
    Trial,
)
from mixforge.evaluator.evaluation import Environment, Evaluation, Outcome, Profile

if TYPE_CHECKING:
    from mixforge.db.encoding import Values

# Outcomes under which the same budget may give figures another time: of a machine that was busy, small or ill.
_MAY_BE_THE_MACHINES = frozenset({Outcome.timed_out, Outcome.out_of_memory, Outcome.crashed})


class Store:
    """An open database of campaigns. Use it in a `with` block, or close it."""

    def __init__(self, database: Database) -> None:
        self.migration = prepare(database)
        """What opening it did to an older schema."""
        self.database = database

    @classmethod
    def open(cls, location: str | Path, mode: Mode = "write") -> Store:
        """Opens a path or URL: to `read`, to `write` into what is there, or to `create` one where none is.

        An older schema is migrated first. Raises StoreError for what is not a database of ours.
        """
        return cls(Database(location, mode))

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Campaigns and the time spent on them.

    def add_campaign(self, name: str, digest: str, text: str, seed: int) -> int:
        """The id of the campaign of this name, added where it is new.

        Raises ValueError where the name is taken by a campaign with another digest.
        """
        values = {"name": name, "digest": digest, "text": text, "seed": seed, "created_at": _now()}
        with self.database.write() as connection:
            rows.add_once(connection, tables.campaign, values, "name")
            found = connection.execute(
                select(tables.campaign.c.id, tables.campaign.c.digest).where(tables.campaign.c.name == name)
            ).one()
        if found.digest != digest:
            raise ValueError(
                f"campaign {name!r} is already in {self.database.name} with another content "
                f"(digest {found.digest[:12]}, now {digest[:12]}); give the changed file a new name, "
                "or restore the file to go on with the old one"
            )
        return int(found.id)

    def campaigns(self) -> tuple[StoredCampaign, ...]:
        """All campaigns, oldest first."""
        with self.database.read() as connection:
            found = connection.execute(select(tables.campaign).order_by(tables.campaign.c.id)).mappings()
            return tuple(encoding.campaign_from(row) for row in found)

    def campaign(self, name: str) -> StoredCampaign:
        """Raises ValueError where there is none of that name."""
        found = self.campaigns()
        for campaign in found:
            if campaign.name == name:
                return campaign
        names = ", ".join(campaign.name for campaign in found) or "none"
        raise ValueError(f"there is no campaign {name!r} in {self.database.name}; it has: {names}")

    def begin_run(self, campaign: int, driver: str) -> int:
        """Notes that a driver starts to work on a campaign; gives the run's id."""
        values = {"campaign_id": campaign, "driver": driver, "started_at": _now(), "seconds": 0.0}
        with self.database.write() as connection:
            return rows.add(connection, tables.run, values)

    def spend(self, run: int, seconds: float, *, ended: bool = False) -> None:
        """Sets how long a run has worked, by the driver's monotonic clock. Call it again as time goes by."""
        with self.database.write() as connection:
            connection.execute(
                update(tables.run)
                .where(tables.run.c.id == run)
                .values(seconds=seconds, ended_at=_now() if ended else None)
            )

    def spent_s(self, campaign: int) -> float:
        """Wall time of all runs of a campaign."""
        with self.database.read() as connection:
            return rows.spent_s(connection, campaign)

    # One trial, from proposed to finished.

    def propose(self, campaign: int, proposal: Proposal) -> int:
        """Stores what a sampler proposed, before anything is run; gives the trial's id.

        Raises StoreError where the campaign has a trial of that number: another driver works on it.
        """
        architecture = encoding.architecture_values(proposal.architecture) | {"created_at": _now()}
        parents = (*proposal.parents, None, None)[:2]
        values = {
            "campaign_id": campaign,
            "number": proposal.number,
            "architecture": proposal.architecture.digest,
            "budget": proposal.budget,
            "origin": proposal.origin,
            "parent": parents[0],
            "second_parent": parents[1],
            "operator": proposal.operator,
            "state": State.proposed.value,
            "reused": False,
            "choices": encoding.choices_values(proposal.choices),
            "attributes": dict(proposal.attributes),
            "rejected": dict(proposal.rejected),
            "proposed_at": _now(),
        }
        with self.database.write() as connection:
            rows.add_once(connection, tables.architecture, architecture, "digest")
            try:
                return rows.add(connection, tables.trial, values)
            except IntegrityError as failure:
                raise StoreError(
                    f"trial {proposal.number} cannot be added to {self.database.name}: another run of this "
                    f"campaign has added it, or a parent is unknown ({failure.orig})"
                ) from failure

    def save_attributes(self, trial: int, attributes: Mapping[str, object]) -> None:
        """Replaces the sampler's notes of a trial, which change when it is told the result."""
        with self.database.write() as connection:
            rows.set_trial(connection, trial, {"attributes": dict(attributes)})

    def claim(self, trial: int, stage: Stage, worker: str) -> int:
        """A new token for one stage of a trial; older tokens of the trial can record no more.

        Raises ValueError where the trial neither waits for that stage nor is in it.
        """
        waiting, working = transitions.WAITING[stage], transitions.WORKING[stage]
        now = _now()
        new = {"trial_id": trial, "stage": stage, "worker": worker, "started_at": now}
        with self.database.write() as connection:
            row = rows.lock_trial(connection, trial)
            if row["state"] not in (waiting, working):
                raise ValueError(f"trial {row['number']} is {row['state']}; it cannot be claimed to {stage}")
            token = rows.add(connection, tables.attempt, new)
            if row["state"] == working:
                superseded = {"reason": f"superseded by attempt {token}", "ended_at": now}
                rows.end_attempt(connection, row["token"], superseded)
            rows.set_trial(connection, trial, {"state": working.value, "token": token})
            return token

    def record_evaluation(
        self, token: int, evaluation: Evaluation, *, seconds: float, last: bool = False
    ) -> Trial:
        """Records what training gave; the trial then waits for its profile.

        It is finished instead where the outcome is not ok, or where `last` says that no profile is wanted.
        `seconds` is how long the attempt took. Where the same architecture was evaluated under the same
        budget meanwhile, that evaluation stays and the trial takes its figures, but for an outcome that may
        have been the machine's: that one is replaced, and its attempt keeps what it was.
        Raises StaleToken, and ValueError for an ok evaluation with a score that is not a number.
        """
        values, now = encoding.evaluation_values(evaluation), _now()
        with self.database.write() as connection:
            row = transitions.hold(connection, token, "train")
            stored = rows.find_evaluation(connection, row["architecture"], row["budget"])
            stays = None if stored is None or stored["outcome"] in _MAY_BE_THE_MACHINES else stored
            if stays is None:
                identity = {"architecture": row["architecture"], "budget": row["budget"], "attempt_id": token}
                environment = rows.add_environment(connection, evaluation.environment)
                measured = {**values, **identity, "environment": environment, "recorded_at": now}
                if stored is None:
                    rows.add(connection, tables.evaluation, measured)
                else:
                    rows.replace_evaluation(connection, stored["id"], measured)
            rows.end_attempt(connection, token, _ending(values, seconds, now))
            after = transitions.after_training(stays or values, last=last, now=now)
            rows.set_trial(connection, row["id"], after)
            return rows.trial(connection, row["id"])

    def record_profile(self, token: int, profile: Profile, *, seconds: float) -> Trial:
        """Records what was measured on the device, and finishes the trial.

        Raises StaleToken, and ValueError for a repeat that is not a number.
        """
        values, now = encoding.profile_values(profile), _now()
        with self.database.write() as connection:
            row = transitions.hold(connection, token, "profile")
            identity = {"architecture": row["architecture"], "budget": row["budget"], "attempt_id": token}
            rows.add_profile(connection, values, profile.environment, identity, now)
            rows.end_attempt(connection, token, _ending(values, seconds, now))
            rows.set_trial(connection, row["id"], transitions.after_profiling(values, now))
            return rows.trial(connection, row["id"])

    def record_failure(
        self,
        token: int,
        outcome: Outcome,
        reason: str,
        trace: str | None = None,
        *,
        seconds: float,
        last: bool,
    ) -> Trial:
        """Records an attempt that gave nothing: its worker died, hung or ran out of memory.

        `last` finishes the trial with that outcome; otherwise it waits to be claimed again.
        Raises StaleToken, and ValueError for the outcome ok.
        """
        if outcome is Outcome.ok:
            raise ValueError("a failure cannot have the outcome ok")
        values, now = {"outcome": outcome.value, "reason": reason, "trace": trace}, _now()
        with self.database.write() as connection:
            row = transitions.hold(connection, token)
            rows.end_attempt(connection, token, _ending(values, seconds, now))
            after = transitions.finish(values, now) if last else transitions.wait_again(row)
            rows.set_trial(connection, row["id"], after)
            return rows.trial(connection, row["id"])

    def answer(
        self, trial: int, *, last: bool = False, environment: Environment | None = None
    ) -> Trial | None:
        """Answers a proposed trial from the store, where its architecture was evaluated under its budget.

        The trial then waits for its profile, or is finished: where the stored outcome is not ok, where `last`
        says that no profile is wanted, or where the same device of the same host has profiled it under the
        same budget and torch. None where there is no such evaluation, or the trial is no longer proposed, or
        where another campaign's evaluation ended by an outcome that may have been its machine's: that is tried
        again.
        """
        now = _now()
        with self.database.write() as connection:
            row = rows.lock_trial(connection, trial)
            identity = (row["architecture"], row["budget"])
            stored = rows.find_evaluation(connection, *identity)
            if stored is None or row["state"] != State.proposed:
                return None
            if stored["outcome"] in _MAY_BE_THE_MACHINES and row["campaign_id"] != rows.campaign_of(
                connection, stored["attempt_id"]
            ):
                return None
            after = transitions.after_training(stored, last=last, now=now) | {"reused": True}
            if after["state"] == State.trained and environment is not None:
                profile = rows.find_profile(connection, *identity, environment)
                if profile is not None:
                    after |= transitions.after_profiling(profile, now)
            rows.set_trial(connection, trial, after)
            return rows.trial(connection, trial)

    def abandon_open_attempts(self, campaign: int, reason: str = "its driver stopped") -> int:
        """Ends the attempts that a dead driver left open; their trials wait again. Gives how many."""
        attempt, trial = tables.attempt, tables.trial
        open_ones = (
            select(attempt.c.id, attempt.c.trial_id)
            .join(trial, trial.c.id == attempt.c.trial_id)
            .where(trial.c.campaign_id == campaign, attempt.c.ended_at.is_(None))
        )
        ending = {"reason": f"abandoned: {reason}", "ended_at": _now()}
        with self.database.write() as connection:
            found = connection.execute(open_ones).all()
            for token, key in found:
                row = rows.lock_trial(connection, key)
                rows.end_attempt(connection, token, ending)
                rows.set_trial(connection, key, transitions.wait_again(row))
            return len(found)

    # What is stored.

    def trials(self, campaign: int, *, since: int = 0) -> tuple[Trial, ...]:
        """A campaign's trials by number, from number `since` on."""
        query = rows.trials().where(tables.trial.c.campaign_id == campaign, tables.trial.c.number >= since)
        with self.database.read() as connection:
            found = connection.execute(query.order_by(tables.trial.c.number)).mappings()
            return tuple(encoding.trial_from(row) for row in found)

    def trial(self, trial: int) -> Trial:
        """One trial by its id."""
        with self.database.read() as connection:
            return rows.trial(connection, trial)

    def attempts(self, campaign: int) -> tuple[Attempt, ...]:
        """All attempts at a campaign's trials, oldest first."""
        attempt, trial = tables.attempt, tables.trial
        query = (
            select(attempt)
            .join(trial, trial.c.id == attempt.c.trial_id)
            .where(trial.c.campaign_id == campaign)
            .order_by(attempt.c.id)
        )
        with self.database.read() as connection:
            return tuple(encoding.attempt_from(row) for row in connection.execute(query).mappings())

    def evaluation(self, digest: str, budget: str) -> Evaluation | None:
        """What is stored of an architecture under a budget."""
        with self.database.read() as connection:
            row = rows.find_evaluation(connection, digest, budget)
            if row is None:
                return None
            return encoding.evaluation_from(row, rows.environment(connection, row["environment"]))

    def add_profile(self, architecture: StoredArchitecture, profile: Profile) -> None:
        """Stores a profile that was measured outside any campaign."""
        values, now = encoding.profile_values(profile), _now()
        described = encoding.architecture_values(architecture) | {"created_at": now}
        with self.database.write() as connection:
            rows.add_once(connection, tables.architecture, described, "digest")
            identity = {"architecture": architecture.digest}
            rows.add_profile(connection, values, profile.environment, identity, now)


def _now() -> datetime:
    return datetime.now(UTC)


def _ending(values: Values, seconds: float, now: datetime) -> Values:
    kept = {name: values[name] for name in ("outcome", "reason", "trace")}
    return kept | {"ended_at": now, "seconds": seconds}
