"""Commands that write for others: export a model, report on a campaign."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixforge.cli.database import open_results
from mixforge.cli.findings import CampaignName, newest, objectives
from mixforge.cli.output import DEFAULT_DATABASE, Database, Json, RunFailed, narrate, print_json, scaled

if TYPE_CHECKING:
    from mixforge.db.results import Results
    from mixforge.db.values import StoredCampaign
    from mixforge.export.card import Card
    from mixforge.search_space.architecture import Architecture


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: mixforge export best winner")(export)
    app.command(epilog="Example: mixforge report laptop report.html")(report)


def export(
    which: Annotated[
        str,
        typer.Argument(metavar="DIGEST|best", help="A digest, or the front's best in the first objective."),
    ],
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    campaign: CampaignName = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="A safetensors file; the kept weights if left out.")
    ] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Draw fresh weights instead.")] = False,
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """Write a model that runs without Mixforge: model.py, config.json, model.safetensors and CARD.md.

    What was written is checked before the folder appears: logits as in the searched model, step as forward, causal.
    """
    from mixforge.cli.naming import architecture_of
    from mixforge.export.export import ExportError
    from mixforge.export.export import export as write

    if folder.exists():
        raise ValueError(f"{folder} exists; give a folder that does not exist yet")
    with open_results(db) as results:
        if which == "best":
            which = _best(results, newest(results, campaign, db))
        architecture = architecture_of(which, db)
        stored = architecture.digest in {each.digest for each in results.architectures}
        card = _card(results, architecture, campaign) if stored else None
    place = None if untrained else weights or _kept(architecture, card, db)
    try:
        from mixforge.export.card import Card

        done = write(architecture, place, folder, card or Card())
    except ExportError as error:
        raise RunFailed(str(error)) from error
    if as_json:
        print_json(
            {
                "folder": str(done.folder),
                "digest": architecture.digest,
                "architecture": str(architecture),
                "params": done.params,
                "files": dict(done.files),
                "weights_sha256": done.weights_sha256,
                "differences": dict(done.differences),
            }
        )
        return
    print(architecture)
    for name, size in done.files.items():
        print(f"  {done.folder / name}  {scaled(size)}B")
    largest = max(done.differences.values())
    narrate(f"checked without Mixforge: the largest difference of a logit is {largest:.1e} (float32)")
    print(f'Try: python {done.folder}/model.py --prompt "def "')


def _best(results: Results, campaign: StoredCampaign) -> str:
    members = results.front(objectives(campaign), campaign=campaign.name)
    if not members:
        raise ValueError(
            f"campaign {campaign.name} has no finished trial yet, so there is no best one to export"
        )
    return members[0].digest


def _card(results: Results, architecture: Architecture, campaign: str | None) -> Card:
    from mixforge.export.card import Card

    dossier = results.show(architecture.digest)
    found = [(name, trial) for name, trial in dossier.trials if campaign in (None, name)] or list(
        dossier.trials
    )
    name, trial = found[-1] if found else (None, None)
    evaluation = next(
        (each for budget, each in dossier.evaluations if trial is None or budget == trial.budget), None
    )
    text = next((each.text for each in results.campaigns if each.name == name), None)
    return Card(
        campaign=name,
        trial=None if trial is None else trial.number,
        budget=None if trial is None else trial.budget,
        training=None if text is None else _training(text),
        evaluation=evaluation,
        profiles=dossier.profiles,
    )


def _training(text: str) -> str:
    """What the campaign's file says of tasks and training, one setting a line."""

    def lines(table: dict[str, object], path: str) -> list[str]:
        made = []
        for key, value in table.items():
            made += lines(value, f"{path}.{key}") if isinstance(value, dict) else [f"{path}.{key} = {value}"]
        return made

    return "\n".join(lines(tomllib.loads(text).get("tasks", {}), "tasks"))


def _kept(architecture: Architecture, card: Card | None, db: str) -> Path:
    """The weights that the search kept. Raises ValueError, with the way out, where there are none."""
    from mixforge.cli.naming import folder_of

    name = None if card is None or card.evaluation is None else card.evaluation.weights
    if name is None:
        raise ValueError(
            f"no trained weights of {architecture.digest[:12]} are stored in {db}; name a safetensors file with "
            "--weights, or write untrained ones with --untrained"
        )
    return folder_of(db) / "weights" / name


def report(
    campaign: Annotated[str | None, typer.Argument(help="A campaign's name; the newest if left out.")] = None,
    page: Annotated[Path, typer.Argument(help="The HTML file to write.")] = Path("report.html"),
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE.svg", help="Write the front as an SVG picture too."),
    ] = None,
    db: Database = DEFAULT_DATABASE,
    as_json: Json = False,
) -> None:
    """Write one HTML page: the front with spreads and baselines, search against chance, learning curves, layers."""
    from mixforge.cli.reporting import write

    written = write(campaign, page, picture, db)
    if as_json:
        print_json(written)
        return
    for name, size in written.items():
        print(f"{name}  {scaled(size)}B")
