"""The command that shows one architecture: its layers, their costs, and everything that is stored of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixforge.cli.database import open_results
from mixforge.cli.findings import trial_json
from mixforge.cli.output import (
    DEFAULT_DATABASE,
    Database,
    Json,
    figure_text,
    narrate,
    print_json,
    show_table,
    table,
)
from mixforge.evaluator.evaluation import FIGURES, PHASES, SCORES
from mixforge.search_space.count import counted

if TYPE_CHECKING:
    from mixforge.db.values import Dossier
    from mixforge.evaluator.evaluation import Evaluation, Profile
    from mixforge.search_space.architecture import Architecture
    from mixforge.search_space.mixer import Cost


def register(app: typer.Typer) -> None:
    app.command(epilog='Example: mixforge show "lm(6 * (gdn + swiglu), width=128)"')(show)


def show(
    which: Annotated[str, typer.Argument(metavar="DIGEST|EXPR|PRESET", help="What to show.")],
    context: Annotated[
        int,
        typer.Option("--context", min=1, max=2**24, help="Tokens of context that costs are stated at."),
    ] = 2048,
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """One architecture: its layers and what each costs, and every figure that is stored of it."""
    from mixforge.cli.naming import architecture_of

    architecture = architecture_of(which, db)
    dossier = _dossier(architecture.digest, db)
    if as_json:
        print_json(_architecture_json(architecture, context, dossier))
        return
    _show_architecture(architecture, context)
    if dossier is None:
        narrate(f"nothing is stored of it in {db}")
        return
    for budget, evaluation in dossier.evaluations:
        _show_evaluation(budget, evaluation)
    for profile in dossier.profiles:
        _show_profile(profile)
    for name, trial in dossier.trials:
        print(
            f"Trial {trial.number} of campaign {name}, from {trial.origin}: {trial.outcome or trial.state}."
        )
    if len(dossier.attempts) > 2:
        print(f"{len(dossier.attempts)} attempts were made at it.")


def _dossier(digest: str, db: str) -> Dossier | None:
    """What is stored of an architecture. Without any search there is no database yet, which is no error."""
    if db == DEFAULT_DATABASE and not Path(db).exists():
        return None

    with open_results(db) as results:
        known = any(stored.digest == digest for stored in results.architectures)
        return results.show(digest) if known else None


def _show_architecture(architecture: Architecture, context: int) -> None:
    print(architecture)
    print(f"digest {architecture.digest}")
    reason = architecture.why_illegal()
    if reason is not None:
        raise ValueError(f"it cannot be built: {reason}")
    if architecture.prefix:
        print(f"reads its first {architecture.prefix} tokens together; no prediction of them counts")
    made = table(
        "layer >", "mixer", "genes", "times >", "params >", f"FLOPs at {context} >", f"state bytes at {context} >",
        "bytes per decoded token >",
    )  # fmt: skip
    for entry in architecture.layers:
        cost = entry.cost(context)
        made.add_row(
            str(entry.number),
            entry.name,
            entry.genes or "-",
            str(entry.times) if entry.times > 1 else "-",
            *(figure_text(name, value) for name, value in _costs(cost).items()),
        )
    made.add_section()
    whole = _costs(architecture.cost(context))
    made.add_row(
        "all", "with embedding, norms and head", "", "", *(figure_text(name, whole[name]) for name in whole)
    )
    show_table(made)


def _costs(cost: Cost) -> dict[str, int]:
    return {
        "params": cost.params,
        "flops": cost.flops,
        "state_bytes": cost.state_bytes,
        "decode_bytes": cost.decode_bytes,
    }


def _show_evaluation(budget: str, evaluation: Evaluation) -> None:
    made = table("figure", "selection >", "test >", "unit", title=f"Trained under budget {budget[:12]}")
    for name in SCORES:
        value = getattr(evaluation, name)
        if value is not None:
            made.add_row(
                FIGURES[name].label,
                figure_text(name, value),
                figure_text(name, getattr(evaluation, f"{name}_test")),
                FIGURES[name].unit,
            )
    show_table(made)
    if evaluation.reason is not None:
        print(f"{evaluation.outcome}: {evaluation.reason}")
    environment = evaluation.environment
    print(
        f"{counted(evaluation.train_tokens, 'token')} in {evaluation.train_s:.1f} s with the {evaluation.backend} "
        f"backend, seed {evaluation.seed}, on {environment.device} ({counted(environment.threads, 'thread')}), "
        f"torch {environment.torch}, commit {(environment.commit or 'none')[:12]}.\n"
    )


def _show_profile(profile: Profile) -> None:
    load = profile.workload
    made = table(
        "phase", "median ms >", "spread ms >", "repeats >",
        title=f"Measured at batch {load.batch}, context {load.context}, {load.dtype}, on {profile.environment.device}",
    )  # fmt: skip
    for phase in PHASES:
        timing = profile.timing(phase)
        if timing is not None:
            made.add_row(phase, f"{timing.median_ms:.4g}", f"{timing.spread_ms:.2g}", str(len(timing.raw_ms)))
    show_table(made)
    if profile.peak_bytes is not None:
        print(f"Peak memory of a train step: {figure_text('peak_bytes', profile.peak_bytes)}B.\n")


def _architecture_json(
    architecture: Architecture, context: int, dossier: Dossier | None
) -> dict[str, object]:
    return {
        "architecture": str(architecture),
        "digest": architecture.digest,
        "prefix": architecture.prefix,
        "why_illegal": architecture.why_illegal(),
        "context": context,
        "cost": architecture.cost(context)._asdict() if architecture.why_illegal() is None else None,
        "layers": [
            {
                "number": entry.number,
                "mixer": entry.name,
                "genes": entry.genes,
                "times": entry.times,
                **entry.cost(context)._asdict(),
            }
            for entry in architecture.layers
        ]
        if architecture.why_illegal() is None
        else None,
        "evaluations": [] if dossier is None else [asdict(each) for _, each in dossier.evaluations],
        "profiles": [] if dossier is None else [asdict(each) for each in dossier.profiles],
        "trials": []
        if dossier is None
        else [{"campaign": name, **trial_json(each)} for name, each in dossier.trials],
    }
