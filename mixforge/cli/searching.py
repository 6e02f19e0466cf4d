"""The command that runs a campaign: search, with its live picture."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixforge.cli.database import open_results, open_store
from mixforge.cli.findings import newest, objectives, show_front, trial_json
from mixforge.cli.output import (
    DEFAULT_DATABASE,
    Database,
    Json,
    RunFailed,
    console,
    duration,
    figure_text,
    narrate,
    print_json,
    table,
)
from mixforge.evaluator.evaluation import FIGURES
from mixforge.search_space.count import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

    from mixforge.orchestrator.campaign import Campaign
    from mixforge.orchestrator.progress import Ending, Progress

# Without a terminal a line is written so often.
_LINE_EVERY_S = 15.0
EXAMPLE = Path("examples/laptop.toml")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: mixforge search examples/laptop.toml")(search)


def search(
    file: Annotated[Path, typer.Argument(help="The campaign's TOML file.")] = EXAMPLE,
    db: Database = DEFAULT_DATABASE,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, max=65_536, help="Candidates trained at once; one a core if left out."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search a campaign's space, or go on with it: the same command after any interruption loses nothing.

    The trained weights are kept in a folder `weights` beside the database.
    """
    from mixforge.cli.naming import folder_of, make_folder
    from mixforge.evaluator.environment import environment
    from mixforge.kernels.backend import check_backend
    from mixforge.orchestrator.campaign import Campaign
    from mixforge.orchestrator.run import run

    if file == EXAMPLE and not file.exists():
        raise ValueError(f"there is no {EXAMPLE} here; name a campaign file: mixforge search FILE")
    campaign = Campaign.read(file)
    environment(device)
    # Before a file is made for what cannot run.
    check_backend(campaign.budget.backend, device)
    weights = folder_of(db) / "weights"
    make_folder(weights.parent, "--db")
    with open_store(db, "create") as store, _picture(campaign, plain=as_json) as watch:
        try:
            ending = run(campaign, store, device=device, workers=workers, weights=weights, watch=watch)
        except RuntimeError as error:
            raise RunFailed(str(error)) from error
    with open_results(db) as results:
        stored = newest(results, campaign.name, db)
        front = results.front(objectives(stored), campaign=campaign.name)
    if as_json:
        print_json({**_ending_json(ending), "front": [trial_json(each) for each in front]})
    else:
        show_front(front, objectives(stored), stored)
        _show_ending(ending, db, has_weights=any(task.keeps_weights for task in campaign.budget.tasks))
    if ending.why == "interrupted":
        raise typer.Exit(130)


def _ending_json(ending: Ending) -> dict[str, object]:
    progress = ending.progress
    volumes = progress.volumes
    return {
        "campaign": progress.campaign,
        "why": ending.why,
        "trials": progress.trials_done,
        "baselines": progress.baselines_done,
        "outcomes": dict(progress.outcomes),
        "rejected": dict(progress.rejected),
        "spent_s": progress.spent_s,
        "idle_share": progress.idle_share,
        "hypervolume": None
        if volumes is None
        else {
            "search": volumes.search,
            "search_matched": volumes.search_matched,
            "random": volumes.random,
            "baselines": volumes.baselines,
        },
    }


def _show_ending(ending: Ending, db: str, *, has_weights: bool) -> None:
    """`has_weights`: whether the campaign keeps trained weights, so that there is something to export."""
    progress = ending.progress
    if progress.volumes is not None:
        volumes = progress.volumes
        print(
            f"Hypervolume: search {volumes.search:.4g}; at equal budget search {volumes.search_matched:.4g} against "
            f"random {volumes.random:.4g}; baselines {volumes.baselines:.4g}."
        )
    print(f"{ending.sentence} Wall time of all runs: {duration(progress.spent_s)}.")
    if ending.why == "interrupted":
        return
    option = "" if db == DEFAULT_DATABASE else f" --db {db}"
    if failed := _failed(progress):
        where = f"campaign = '{progress.campaign}' and outcome != ok"
        print(
            f"Not ok: {failed}. The reasons: "
            f'mixforge query --where "{where}" --columns digest,outcome,reason{option}'
        )
    print(f"Next: mixforge report {progress.campaign} report.html{option}")
    if has_weights:
        print(f"      mixforge export best winner{option}")


@contextmanager
def _picture(campaign: Campaign, *, plain: bool) -> Iterator[Callable[[Progress], None]]:
    """What to call with the progress: redraws a picture on a terminal, else writes a line now and then."""
    screen = console(stderr=True)
    if plain or not screen.is_terminal:
        yield _lines()
        return
    from rich.live import Live

    with Live(console=screen, auto_refresh=False, transient=True) as live:
        yield lambda progress: live.update(_draw(progress), refresh=True)


def _lines() -> Callable[[Progress], None]:
    """A line for every finished baseline at first, then one every few seconds."""
    spoken = [float("-inf"), -1.0]

    def speak(progress: Progress) -> None:
        done = progress.baselines_done + progress.trials_done
        now = time.monotonic()
        if now - spoken[0] < _LINE_EVERY_S or (done == spoken[1] and now - spoken[0] < 4 * _LINE_EVERY_S):
            return
        spoken[:] = [now, done]
        narrate(_sentence(progress))

    return speak


def _sentence(progress: Progress) -> str:
    if progress.trials is None:
        trials = counted(progress.trials_done, "trial")
    else:
        trials = f"{progress.trials_done} of {counted(progress.trials, 'trial')}"
    best = ", ".join(f"{each.figure} {figure_text(each.figure, each.value)}" for each in progress.best)
    return (
        f"{progress.campaign}: {progress.phase}, {progress.baselines_done} of "
        f"{counted(progress.baselines, 'baseline')}, {trials}, {progress.front} on the front"
        + (f"; best {best}" if best else "")
        + f"; {', '.join(_times(progress))}"
    )


def _times(progress: Progress) -> list[str]:
    """How long it has been running, and is likely to go on."""
    times = [duration(progress.elapsed_s)]
    if progress.left is not None:
        about = "at most" if progress.left.at_most else "about"
        times.append(f"{about} {duration(progress.left.seconds)} left")
    return times


def _draw(progress: Progress) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    done = progress.baselines_done + progress.trials_done
    total = None if progress.trials is None else progress.baselines + progress.trials
    header = Text.assemble(
        (progress.campaign, "bold"),
        f"   {progress.phase}   {done}{'' if total is None else f' of {total}'} finished   "
        f"{progress.front} on the front   {'   '.join(_times(progress))}",
    )
    bar = ProgressBar(total=total, completed=done, width=60) if total else Text("")
    return Group(header, bar, _running(progress), _standing(progress))


def _running(progress: Progress) -> RenderableType:
    made = table("trial >", "from", "doing", "step >", "loss >", "time >", "architecture")
    for each in progress.running:
        made.add_row(
            str(each.number),
            each.name[:20],
            each.stage + (f" (attempt {each.attempt})" if each.attempt > 1 else ""),
            "-" if each.step is None else f"{each.step}/{each.steps}",
            "-" if each.loss is None else f"{each.loss:.3f}",
            f"{each.seconds:.0f}s",
            each.text,
        )
    return made


def _standing(progress: Progress) -> RenderableType:
    from rich.text import Text

    lines = [
        f"best {FIGURES[each.figure].label}: {figure_text(each.figure, each.value)} {FIGURES[each.figure].unit} "
        f"(trial {each.number}, {each.digest[:12]})"
        for each in progress.best
    ]
    if progress.volumes is not None:
        lines.append(
            f"hypervolume at equal budget: search {progress.volumes.search_matched:.4g}, random "
            f"{progress.volumes.random:.4g}"
        )
    if failed := _failed(progress):
        lines.append(f"not ok: {failed}")
    if progress.rejected:
        lines.append(
            "refused: " + ", ".join(f"{reason} {count}" for reason, count in progress.rejected.items())
        )
    if progress.note is not None:
        lines.append(f"last trouble: {progress.note}")
    return Text("\n".join(lines), style="dim")


def _failed(progress: Progress) -> str:
    """How many trials ended otherwise than ok, by outcome; empty where none did."""
    return ", ".join(
        f"{outcome} {count}" for outcome, count in progress.outcomes.items() if outcome != "ok" and count
    )
