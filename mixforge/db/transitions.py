"""How a trial moves from one state to the next, and who may move it.

    proposed -> training -> trained -> profiling -> finished

A stage that gave nothing goes back to the state before it, or to finished. Every claim gives a larger token;
the trial keeps the newest, and whoever holds another has lost the trial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Connection, bindparam, select

from mixforge.db import encoding, rows, tables
from mixforge.db.values import Stage, State
from mixforge.evaluator.evaluation import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from typing import Any

    from mixforge.db.encoding import Values

WAITING: dict[Stage, State] = {"train": State.proposed, "profile": State.trained}
WORKING: dict[Stage, State] = {"train": State.training, "profile": State.profiling}


class StaleToken(RuntimeError):
    """The token is not its trial's newest, or was used: what was measured under it is not recorded."""


# Built once: see `rows`.
_ATTEMPT = select(tables.attempt).where(tables.attempt.c.id == bindparam("key"))


def hold(connection: Connection, token: int, stage: Stage | None = None) -> Values:
    """Locks and gives the trial that a token is the newest of, and open. Raises StaleToken."""
    held = connection.execute(_ATTEMPT, {"key": token}).mappings().one_or_none()
    if held is None:
        raise StaleToken(f"there is no attempt {token}")
    trial = rows.lock_trial(connection, held["trial_id"])
    if trial["token"] != token:
        raise StaleToken(
            f"attempt {token} at trial {trial['number']} was superseded by attempt {trial['token']}; "
            "its result is not recorded"
        )
    # Read again under the lock: another transaction may have ended it since.
    ended = connection.execute(_ATTEMPT, {"key": token}).mappings().one()
    if ended["ended_at"] is not None:
        raise StaleToken(
            f"attempt {token} at trial {trial['number']} has ended ({ended['reason'] or 'recorded'})"
        )
    if stage is not None and held["stage"] != stage:
        raise StaleToken(f"attempt {token} is to {held['stage']} trial {trial['number']}, not to {stage} it")
    return trial


def after_training(evaluation: Mapping[str, Any], *, last: bool, now: datetime) -> Values:
    """The trial's columns once it has an evaluation. `last`: no profile is wanted after it."""
    figures = encoding.evaluation_figures(evaluation)
    if last or evaluation["outcome"] != Outcome.ok:
        return figures | finish(evaluation, now)
    return figures | {"state": State.trained.value}


def after_profiling(profile: Mapping[str, Any], now: datetime) -> Values:
    return encoding.profile_figures(profile) | finish(profile, now)


def finish(ended: Mapping[str, Any], now: datetime) -> Values:
    return {
        "state": State.finished.value,
        "outcome": ended["outcome"],
        "reason": ended["reason"],
        "finished_at": now,
    }


def wait_again(trial: Values) -> Values:
    """Back to where the stage can be claimed from."""
    before = {WORKING[stage]: WAITING[stage] for stage in WAITING}
    return {"state": before[State(trial["state"])].value}
