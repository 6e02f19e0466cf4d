"""The command that reads a published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mixforge.cli.output import Json, RunFailed, narrate, print_json, scaled

if TYPE_CHECKING:
    from mixforge.checkpoints.checkpoint import Checkpoint


def register(app: typer.Typer) -> None:
    app.command("import", epilog="Example: mixforge import hf path/to/checkpoint imported")(read)


def read(
    form: Annotated[Literal["hf"], typer.Argument(help="hf: a folder in the form of Hugging Face.")],
    checkpoint: Annotated[Path, typer.Argument(help="The folder with config.json and model.safetensors.")],
    folder: Annotated[
        Path | None, typer.Argument(help="A new folder for architecture.txt and weights.safetensors.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into an architecture's text and its weights; without FOLDER, only say the text.

    What cannot be said exactly is refused.
    """
    from mixforge.checkpoints.checkpoint import read as read_checkpoint

    if folder is not None and folder.exists():
        raise ValueError(f"{folder} exists; give a folder that does not exist yet")
    found = read_checkpoint(checkpoint)
    files = {} if folder is None else _write(found, folder)
    params = found.architecture.cost(1).params
    if as_json:
        print_json(
            {
                "architecture": str(found.architecture),
                "digest": found.architecture.digest,
                "model_type": found.model_type,
                "params": params,
                "files": files,
            }
        )
        return
    print(found.architecture)
    narrate(f"{found.model_type}, {scaled(params)} parameters, digest {found.architecture.digest[:12]}")
    for name, size in files.items():
        print(f"  {name}  {scaled(size)}B")


def _write(found: Checkpoint, folder: Path) -> dict[str, int]:
    """The folder is there whole or not at all."""
    from mixforge.evaluator.weights import save_weights
    from mixforge.export.export import ExportError, beside

    about = {"architecture": str(found.architecture), "from": found.model_type}
    try:
        with beside(folder) as written:
            save_weights(found.build(), written / "weights.safetensors", about)
            (written / "architecture.txt").write_text(f"{found.architecture}\n", encoding="utf-8")
            written.rename(folder)
    except (ExportError, OSError) as error:
        raise RunFailed(f"{folder} was not written: {error}") from error
    return {str(each): each.stat().st_size for each in sorted(folder.iterdir())}
