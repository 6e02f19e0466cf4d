"""Values to rows and back. What is written here is read back equal."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from mixforge.db.values import Attempt, Choice, State, StoredArchitecture, StoredCampaign, Trial
from mixforge.evaluator.evaluation import (
    FIGURES,
    PHASES,
    SCORES,
    Curve,
    Environment,
    Evaluation,
    Outcome,
    Profile,
    Timing,
    Workload,
)

if TYPE_CHECKING:
    from typing import Any

    from sqlalchemy import RowMapping

    Values = dict[str, Any]

SPREADS = tuple(f"{phase}_ms" for phase in PHASES)
"""The figures that are stored with a spread, in a column of the same name with `_spread` after it."""

_EVALUATED = ("params", "flops", "state_bytes", "decode_bytes", *SCORES)
_EVALUATION_PLAIN = (
    *("reason", "trace", "context", "params", "flops", "state_bytes", "decode_bytes"),
    *("train_tokens", "train_s", "backend", "seed", "weights"),
)
_BOTH_SPLITS = (*SCORES, *(f"{name}_test" for name in SCORES))


def environment_values(environment: Environment) -> Values:
    details = asdict(environment)
    canonical = json.dumps(details, sort_keys=True, separators=(",", ":"))
    columns = ("device", "device_kind", "torch", "mixforge", "commit", "host")
    return {
        "digest": hashlib.sha256(canonical.encode()).hexdigest(),
        **{name: details[name] for name in columns},
        "details": details,
    }


def architecture_values(architecture: StoredArchitecture) -> Values:
    return {
        "digest": architecture.digest,
        "text": architecture.text,
        "canonical": architecture.canonical,
        "width": architecture.width,
        "depth": architecture.depth,
        "mixers": " ".join(architecture.mixers),
    }


def architecture_from(row: RowMapping) -> StoredArchitecture:
    return StoredArchitecture(
        digest=row["digest"],
        text=row["text"],
        canonical=row["canonical"],
        width=row["width"],
        depth=row["depth"],
        mixers=tuple(row["mixers"].split()),
    )


def campaign_from(row: RowMapping) -> StoredCampaign:
    names = ("id", "name", "digest", "text", "seed", "created_at")
    return StoredCampaign(**{name: row[name] for name in names})


def evaluation_values(evaluation: Evaluation) -> Values:
    """Raises ValueError for an ok evaluation whose score is not a finite number."""
    scores = {name: getattr(evaluation, name) for name in _BOTH_SPLITS}
    if evaluation.outcome is Outcome.ok:
        _check_finite(scores)
    return {
        "outcome": evaluation.outcome.value,
        "reason": evaluation.reason,
        "trace": evaluation.trace,
        "context": evaluation.context,
        "params": evaluation.params,
        "flops": evaluation.flops,
        "state_bytes": evaluation.state_bytes,
        "decode_bytes": evaluation.decode_bytes,
        **{name: value if value is None or math.isfinite(value) else None for name, value in scores.items()},
        "train_tokens": evaluation.train_tokens,
        "train_s": evaluation.train_s,
        "curves": [
            {"task": curve.task, "steps": list(curve.steps), "loss": [_number(loss) for loss in curve.loss]}
            for curve in evaluation.curves
        ],
        "backend": evaluation.backend,
        "seed": evaluation.seed,
        "weights": evaluation.weights,
    }


def evaluation_from(row: Values, environment: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        outcome=Outcome(row["outcome"]),
        **{name: row[name] for name in _EVALUATION_PLAIN},
        **{name: row[name] for name in _BOTH_SPLITS},
        curves=tuple(
            Curve(task=curve["task"], steps=tuple(curve["steps"]), loss=tuple(map(float, curve["loss"])))
            for curve in row["curves"]
        ),
        environment=Environment(**environment),
    )


def evaluation_figures(evaluation: Mapping[str, Any]) -> Values:
    """The trial's columns that an evaluation's row fills."""
    return {name: evaluation[name] for name in _EVALUATED}


def profile_values(profile: Profile) -> Values:
    """Raises ValueError for a repeat that is not a finite number."""
    columns: Values = {}
    for phase in PHASES:
        timing = profile.timing(phase)
        if timing is not None:
            _check_finite({f"{phase}_ms": sum(timing.raw_ms)})
        columns[f"{phase}_ms"] = None if timing is None else timing.median_ms
        columns[f"{phase}_ms_spread"] = None if timing is None else timing.spread_ms
    return {
        "outcome": profile.outcome.value,
        "reason": profile.reason,
        "trace": profile.trace,
        "batch": profile.workload.batch,
        "context": profile.workload.context,
        "dtype": profile.workload.dtype,
        "backend": profile.backend,
        **columns,
        "peak_bytes": profile.peak_bytes,
        "timings": [
            {"phase": timing.phase, "raw_ms": list(timing.raw_ms), "captured": timing.captured}
            for timing in profile.timings
        ],
    }


def profile_from(row: Values, environment: Mapping[str, Any]) -> Profile:
    return Profile(
        outcome=Outcome(row["outcome"]),
        reason=row["reason"],
        trace=row["trace"],
        workload=Workload(batch=row["batch"], context=row["context"], dtype=row["dtype"]),
        timings=tuple(
            Timing(phase=timing["phase"], raw_ms=tuple(timing["raw_ms"]), captured=timing["captured"])
            for timing in row["timings"]
        ),
        peak_bytes=row["peak_bytes"],
        backend=row["backend"],
        environment=Environment(**environment),
    )


def profile_figures(profile: Mapping[str, Any]) -> Values:
    """The trial's columns that a profile's row fills."""
    return {name: profile[name] for name in (*SPREADS, *(f"{name}_spread" for name in SPREADS), "peak_bytes")}


def choices_values(choices: Sequence[Choice]) -> list[list[str | int]]:
    return [[choice.name, choice.index, choice.option, choice.options] for choice in choices]


def trial_from(row: RowMapping) -> Trial:
    """From a row of the trial's columns and its architecture's `text`."""
    parents = (row["parent"], row["second_parent"])
    return Trial(
        id=row["id"],
        campaign=row["campaign_id"],
        number=row["number"],
        digest=row["architecture"],
        text=row["text"],
        budget=row["budget"],
        origin=row["origin"],
        parents=tuple(parent for parent in parents if parent is not None),
        operator=row["operator"],
        state=State(row["state"]),
        outcome=None if row["outcome"] is None else Outcome(row["outcome"]),
        reason=row["reason"],
        reused=row["reused"],
        choices=tuple(
            Choice(name=name, index=index, option=option, options=options)
            for name, index, option, options in row["choices"]
        ),
        attributes=row["attributes"],
        rejected=row["rejected"],
        proposed_at=row["proposed_at"],
        finished_at=row["finished_at"],
        figures={name: row[name] for name in FIGURES if row[name] is not None},
        spreads={name: row[f"{name}_spread"] for name in SPREADS if row[f"{name}_spread"] is not None},
    )


def attempt_from(row: RowMapping) -> Attempt:
    return Attempt(
        token=row["id"],
        trial=row["trial_id"],
        stage=row["stage"],
        worker=row["worker"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        seconds=row["seconds"],
        outcome=None if row["outcome"] is None else Outcome(row["outcome"]),
        reason=row["reason"],
        trace=row["trace"],
    )


def _check_finite(values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, which cannot be recorded as a measured figure")


def _number(value: float) -> float | str:
    """JSON has no word for what a diverged loss is, so it is kept as text that `float` reads."""
    return value if math.isfinite(value) else str(value)
