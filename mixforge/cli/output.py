"""How the command line speaks: data on stdout, narration on stderr, figures with their units."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mixforge.evaluator.evaluation import FIGURES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DEFAULT_DATABASE = "runs/mixforge.db"

# An architecture's text is read in lines of so many characters or more.
_READABLE = 32

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Database = Annotated[
    str,
    typer.Option(
        "--db", metavar="URL", help="The database: a file's path, or an SQLAlchemy URL.", show_default=True
    ),
]


class RunFailed(Exception):
    """The request was right and the run failed: exit status 1."""


def narrate(text: str) -> None:
    """Say something that is not data."""
    print(f"mixforge: {text}", file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """One JSON document on stdout. A figure that is not finite is null: JSON has no word for it."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; a column whose name ends in ' >' is set to the right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        right = column.endswith(" >")
        # A number or a digest that is broken over two lines can be neither read nor copied.
        whole = right or column == "digest"
        made.add_column(
            column.removesuffix(" >"), justify="right" if right else "left", overflow="fold", no_wrap=whole
        )
    return made


def figure_text(name: str, value: float | None, spread: float | None = None) -> str:
    """A figure for a table cell. Bytes, weights and FLOPs get a decimal prefix; a missing figure is a dash."""
    if value is None:
        return "-"
    unit = FIGURES[name].unit if name in FIGURES else ""
    if unit in ("byte", "weights", "FLOP"):
        return scaled(value)
    if unit == "ms":
        # Rounded to 100 it has its three digits without a point.
        text = f"{value:#.3g}" if value < 99.95 else f"{value:.0f}"
        return text if spread is None else f"{text} ±{spread:.2g}"
    return f"{value:.3f}"


def scaled(value: float) -> str:
    """`1234567` as `1.23M`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """`754` as `12m34s`."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds // 60:.0f}m{seconds % 60:02.0f}s"
    return f"{seconds // 3600:.0f}h{seconds % 3600 // 60:02.0f}m"


def show_table(made: Table) -> None:
    """A table on stdout, as wide as the terminal; in a pipe as wide as it needs to be.

    Where a terminal has no room for architectures beside the other columns, they follow below, by their digests.
    """
    out = console()
    # A table's own title would be folded to the table's width.
    if made.title is not None:
        out.print(made.title)
        made.title = None
    parts = [made]
    if not out.is_terminal:
        out.width = 10_000
    else:
        parts = _fitted(made, out)
    for part in parts:
        out.print(part, crop=False)
        if not part.show_edge:
            out.print()


def _fitted(made: Table, out: Console) -> list[Table]:
    """The table, or its architectures in a table of their own where less than a readable width is left for them."""
    from rich.measure import Measurement

    by_name = {str(column.header): column for column in made.columns}
    if "digest" not in by_name or made.columns[-1].header != "architecture":
        return [made]
    beside, below = table(), table(*(name for name in ("digest", "from", "architecture") if name in by_name))
    beside.columns = [column for column in made.columns if column.header not in ("from", "architecture")]
    for column in below.columns:
        column._cells = by_name[str(column.header)]._cells
    beside.rows = below.rows = made.rows
    every = Measurement.get(out, out.options.update(max_width=10_000), made).maximum
    text = max(map(len, by_name["architecture"].cells), default=0)  # type: ignore[arg-type]
    if out.width >= every - max(0, text - _READABLE):
        return [made]
    beside.show_edge = below.show_edge = False
    # Cells that are cut say nothing; a terminal breaks a line that is too long.
    beside.width = Measurement.get(out, out.options.update(max_width=10_000), beside).maximum
    return [beside, below]
