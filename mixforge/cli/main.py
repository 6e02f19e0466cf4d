"""The command line: arguments in, tables out. Every command loads what it needs only when it runs."""

from __future__ import annotations

import gc
import os
import select
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

_STDOUT = 1


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
    # A handle of its own, for a library that finds stdout broken turns it to the void and exits with 1.
    try:
        out = os.dup(_STDOUT)
    except OSError:
        # It was closed before the start.
        sys.exit(_failure())
    has_failed = True
    try:
        status = _failure()
    except SystemExit as end:
        has_failed, status = False, end.code if isinstance(end.code, int) else int(end.code is not None)
    if _reader_has_gone(out):
        # `head` has what it wanted. What is still in the buffer must not be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        # The library's status, which says no more than that. A run that failed has failed for all that.
        status = 0 if status == 1 and not has_failed else status
    os.close(out)
    sys.exit(status)


def _failure() -> int:
    """Runs the command, which ends by SystemExit unless it fails. Gives the exit status of a failure."""
    try:
        app()
    except RunFailed as error:
        narrate(f"failed: {error}")
        return 1
    except ValueError as error:
        from mixforge.db.connection import StoreUnwritable

        narrate(f"error: {error}")
        # The database's own troubles, such as a full disk, are no fault of the request.
        return 1 if isinstance(error, StoreUnwritable) else 2
    except OSError as error:
        narrate(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        narrate("interrupted")
        return 130
    return 0


def _reader_has_gone(out: int) -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    poll = select.poll()
    poll.register(out, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    run()
