"""The command that lists what was published: presets, their papers and their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mixforge.cli.output import Json, figure_text, print_json, show_table, table

if TYPE_CHECKING:
    from mixforge.search_space.presets import Preset


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: mixforge presets griffin")(presets)


def presets(
    name: Annotated[str | None, typer.Argument(help="A preset or a family of them; all if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Published architectures by name, with their papers, at three sizes: tiny, small and published.

    `mixforge show NAME` shows the tiny one, `mixforge show NAME:published` the paper's.
    """
    from mixforge.search_space.presets import PRESETS
    from mixforge.search_space.syntax import nearest

    families = {each.family for each in PRESETS.values()}
    if name is not None and name not in PRESETS and name not in families:
        known = ", ".join(sorted(families))
        raise ValueError(
            f"unknown preset '{name}'{nearest(name, [*PRESETS, *families])}; families of presets are {known}"
        )
    chosen = [each for each in PRESETS.values() if name in (None, each.name, each.family)]
    if as_json:
        print_json({"presets": {each.name: _json(each) for each in chosen}})
    elif name in PRESETS:
        _show(PRESETS[name])
    else:
        made = table("preset", "family", "what", "source")
        for each in chosen:
            made.add_row(each.name, each.family, each.summary, each.paper)
        show_table(made)


def _show(preset: Preset) -> None:
    print(f"{preset.name}: {preset.summary}\n{preset.paper}")
    if preset.departs is not None:
        print(f"Departs: {preset.departs}.")
    made = table("size", "parameters >", "FLOPs a token at 2048 >", "state bytes at 2048 >", "expression")
    for size in preset.sizes:
        architecture = preset.architecture(size)
        cost = architecture.cost(2048)
        made.add_row(
            size,
            figure_text("params", cost.params),
            figure_text("flops", cost.flops / 2048),
            figure_text("state_bytes", cost.state_bytes),
            str(architecture),
        )
    show_table(made)


def _json(preset: Preset) -> dict[str, object]:
    made = {size: preset.architecture(size) for size in preset.sizes}
    return {
        "family": preset.family,
        "summary": preset.summary,
        "paper": preset.paper,
        "departs": preset.departs,
        "sizes": {
            size: {"architecture": str(each), "digest": each.digest, "params": each.cost(1).params}
            for size, each in made.items()
        },
    }
