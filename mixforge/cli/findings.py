"""Commands that ask what was found: status, front, query."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated

import typer

from mixforge.cli.database import open_results
from mixforge.cli.output import (
    DEFAULT_DATABASE,
    Database,
    Json,
    duration,
    figure_text,
    narrate,
    print_json,
    show_table,
    table,
)
from mixforge.evaluator.evaluation import FIGURES
from mixforge.search_space.count import counted

if TYPE_CHECKING:
    from mixforge.db.results import Results
    from mixforge.db.values import Status, StoredCampaign, Trial

# A longer table is not read, and takes longer to draw than to find.
MOST_ROWS = 30
_QUERY_COLUMNS = ("campaign", "number", "origin", "digest", "outcome", "architecture")
CampaignName = Annotated[
    str | None, typer.Option("--campaign", metavar="NAME", help="Only this campaign; the newest if left out.")
]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: mixforge status laptop")(status)
    app.command(epilog="Example: mixforge front laptop --figures bits_per_byte,decode_ms")(front)
    app.command(
        epilog='Example: mixforge query --where "params < 2e6 and bits_per_byte < 3" --order bits_per_byte'
    )(query)


def status(
    campaign: Annotated[str | None, typer.Argument(help="A campaign's name; all if left out.")] = None,
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """How far campaigns are: trials by origin and outcome, time spent, the best of every figure."""

    with open_results(db) as results:
        names = [campaign] if campaign is not None else [found.name for found in results.campaigns]
        found = [results.status(name) for name in names]
    if as_json:
        print_json([_status_json(each) for each in found])
        return
    if not found:
        narrate(f"{db} holds no campaign yet; start one with `mixforge search FILE`")
    for each in found:
        _show_status(each)


def _status_json(status: Status) -> dict[str, object]:
    return {
        "campaign": status.campaign.name,
        "counts": [
            {
                "origin": count.origin,
                "state": count.state,
                "outcome": count.outcome,
                "trials": count.trials,
                "reused": count.reused,
            }
            for count in status.counts
        ],
        "spent_s": status.spent_s,
        "train_s": status.train_s,
        "profile_s": status.profile_s,
        "open_attempts": status.open_attempts,
        "lost_attempts": status.lost_attempts,
        "rejected": dict(status.rejected),
        "best": {
            best.figure: {"value": best.value, "digest": best.digest, "number": best.number}
            for best in status.best
        },
    }


def _show_status(status: Status) -> None:
    trials = table(
        "origin", "state", "outcome", "trials >", "of them reused >", title=f"Campaign {status.campaign.name}"
    )
    for count in status.counts:
        trials.add_row(
            count.origin,
            count.state,
            count.outcome or "-",
            str(count.trials),
            str(count.reused) if count.reused else "-",
        )
    show_table(trials)
    best = table("figure", "best >", "unit", "digest", "trial >")
    for each in status.best:
        figure = FIGURES[each.figure]
        best.add_row(
            figure.label,
            figure_text(each.figure, each.value),
            figure.unit,
            each.digest[:12],
            str(each.number),
        )
    show_table(best)
    print(
        f"Spent {duration(status.spent_s)} of wall time; workers trained for {duration(status.train_s)} and "
        f"profiled for {duration(status.profile_s)}. Attempts open {status.open_attempts}, lost {status.lost_attempts}."
    )
    if status.rejected:
        reasons = ", ".join(f"{reason} {count}" for reason, count in status.rejected.items())
        print(f"Refused before a worker saw them: {reasons}.")
    print()


def newest(results: Results, name: str | None, db: str) -> StoredCampaign:
    """The named campaign, or the newest. Raises ValueError where there is none."""
    campaigns = {campaign.name: campaign for campaign in results.campaigns}
    if not campaigns:
        raise ValueError(f"{db} holds no campaign yet; start one with `mixforge search FILE`")
    if name is None:
        return list(campaigns.values())[-1]
    if name not in campaigns:
        raise ValueError(f"no campaign {name!r} in {db}; it holds {', '.join(campaigns)}")
    return campaigns[name]


def objectives(campaign: StoredCampaign) -> tuple[str, ...]:
    """The figures that a campaign steers by, from its file."""
    return tuple(tomllib.loads(campaign.text)["objectives"])


def origin_of(trial: Trial, campaign: StoredCampaign) -> str:
    """`transformer (baseline)` for a baseline, otherwise what proposed it."""
    names = tomllib.loads(campaign.text).get("baselines", [])
    if trial.origin == "baseline" and trial.number < len(names) and len(names[trial.number]) < 24:
        return f"{names[trial.number]} (baseline)"
    return trial.origin


def front(
    campaign: Annotated[str | None, typer.Argument(help="A campaign's name; the newest if left out.")] = None,
    figures: Annotated[
        str | None,
        typer.Option(
            "--figures", metavar="A,B", help="Figures to trade off; the campaign's objectives if left out."
        ),
    ] = None,
    where: Annotated[str | None, typer.Option("--where", help="Only trials under this condition.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="At most so many rows of the table; JSON has them all.")
    ] = MOST_ROWS,
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """The Pareto front: the architectures that no other one beats in every figure."""

    with open_results(db) as results:
        chosen = newest(results, campaign, db)
        names = objectives(chosen) if figures is None else tuple(name.strip() for name in figures.split(","))
        members = results.front(names, where=where, campaign=chosen.name)
    if as_json:
        print_json(
            {"campaign": chosen.name, "figures": names, "front": [trial_json(each) for each in members]}
        )
        return
    show_front(members, names, chosen, limit)


def trial_json(trial: Trial) -> dict[str, object]:
    """A trial as JSON: the same keys wherever a command prints one."""
    return {
        "number": trial.number,
        "digest": trial.digest,
        "architecture": trial.text,
        "origin": trial.origin,
        "outcome": trial.outcome,
        "figures": dict(trial.figures),
        "spreads": dict(trial.spreads),
    }


def show_front(
    members: tuple[Trial, ...], names: tuple[str, ...], campaign: StoredCampaign, limit: int = MOST_ROWS
) -> None:
    """A front as a table: the figures it trades off, the size of each member, and what it is."""
    columns = [*names, *(name for name in ("params", "state_bytes") if name not in names)]
    made = table(
        "digest",
        *(f"{name} {_arrow(name)} >" for name in columns),
        "from",
        "architecture",
        title=f"Pareto front of {campaign.name}: {counted(len(members), 'architecture')}",
    )
    for trial in members[:limit]:
        cells = [figure_text(name, trial.figures.get(name), trial.spreads.get(name)) for name in columns]
        made.add_row(trial.digest[:12], *cells, origin_of(trial, campaign), trial.text)
    show_table(made)
    if len(members) > limit:
        narrate(f"the front has {len(members) - limit} more; --limit {len(members)} shows all")
    if not members:
        narrate("no finished trial has all of these figures, or none that the condition lets through")


def _arrow(name: str) -> str:
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}; there are {', '.join(FIGURES)}")
    return "↓" if FIGURES[name].better == "lower" else "↑"


def query(
    where: Annotated[
        str | None, typer.Option("--where", help='A condition: "params < 2e6 and gdn in mixers".')
    ] = None,
    order: Annotated[
        str | None, typer.Option("--order", help="A column; with '-' before it, the largest first.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="A,B", help="Columns to show; 'all' for every one.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many rows.")] = None,
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """Trials under a condition, as a table. The condition only selects: it cannot change anything."""
    from mixforge.db.condition import COLUMNS

    if columns == "all":
        names: tuple[str, ...] = COLUMNS
    elif columns is not None:
        names = tuple(name.strip() for name in columns.split(","))
    else:
        mentioned = [
            name for name in FIGURES if name in (where or "") or name == (order or "").removeprefix("-")
        ]
        names = (*_QUERY_COLUMNS[:-1], *mentioned, _QUERY_COLUMNS[-1])
    with open_results(db) as results:
        answer = results.query(where, order=order, columns=names, limit=limit)
    if as_json:
        print_json([dict(zip(answer.columns, map(_plain, row), strict=True)) for row in answer.rows])
        return
    made = table(*(f"{name} >" if name in FIGURES else name for name in answer.columns))
    for row in answer.rows:
        made.add_row(*(_cell(name, value) for name, value in zip(answer.columns, row, strict=True)))
    show_table(made)
    narrate(counted(len(answer.rows), "trial"))


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    if name in FIGURES and isinstance(value, int | float):
        return figure_text(name, value)
    if name in ("digest", "budget", "parent", "second_parent"):
        return str(value)[:12]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
