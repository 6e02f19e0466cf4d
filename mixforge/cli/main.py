"""The command line: arguments in, tables out. Every command loads what it needs only when it runs."""

from __future__ import annotations

import gc
import sys
from typing import Annotated

import typer

from mixforge import __version__
from mixforge.cli import candidates, findings, grammar, importing, publish, published, searching, showing
from mixforge.cli.output import RunFailed, narrate

app = typer.Typer(
    name="mixforge",
    help="Search for the best sequence-model architecture for the hardware you have.",
    epilog="Start with: mixforge search examples/laptop.toml",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mixforge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Search for the best sequence-model architecture for the hardware you have."""


for _room in (searching, findings, showing, candidates, grammar, published, importing, publish):
    _room.register(app)


def run() -> None:
    """The entry point. Exit status: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted."""
    # Loading makes many objects and little garbage: looking for it every 700 objects is a twentieth of a question.
    gc.set_threshold(50_000, 20, 50)
    try:
        app()
    except RunFailed as error:
        narrate(f"failed: {error}")
        sys.exit(1)
    except ValueError as error:
        from mixforge.db.connection import StoreUnwritable

        narrate(f"error: {error}")
        # The database's own troubles, such as a full disk, are no fault of the request.
        sys.exit(1 if isinstance(error, StoreUnwritable) else 2)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has gone: nothing is left to say.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        narrate(f"failed: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        narrate("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    run()
