"""The gate's figures as text: a long table for a terminal, and two for `docs/kernels.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mixforge.kernels.ahead_of_time.judging import Judged
from mixforge.kernels.ahead_of_time.recording import Pass, Recorded

COLUMNS = (
    "kernel", "target", "warps", "registers", "stack B", "spills", "shared B", "tensor columns", "instructions",
    "of matrices", "compile s", "first launched by",
)  # fmt: skip


def terminal(judged: Sequence[Judged]) -> str:
    """One line for each kernel and target, in aligned columns."""
    rows = [COLUMNS, *(_cells(one) for one in judged)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cells(one: Judged) -> tuple[str, ...]:
    found = one.figures
    if found is None:
        figures = ["-"] * 8
    else:
        counts = (
            found.registers, found.stack_bytes, found.spills, found.shared_bytes, found.tensor_columns,
            found.instructions, found.matrix_instructions,
        )  # fmt: skip
        figures = [*(str(count) for count in counts), f"{found.compile_s:.1f}"]
    return (one.kernel, one.target, str(one.warps), *figures, one.launched_by)


def figures_page(judged: Sequence[Judged], targets: Sequence[str]) -> str:
    """A row for each kernel and case, a column for each target."""
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one in judged:
        row = rows.setdefault((one.kernel, one.launched_by), {target: [] for target in targets})
        row[one.target].append(_page_cell(one))
    lines = [_row("kernel", "first launched by", *targets), _row("---", "---", *["---"] * len(targets))]
    for (kernel, launched_by), cells in rows.items():
        lines.append(
            _row(
                f"`{kernel}`", launched_by, *("<br>".join(cells[target]) or "as above" for target in targets)
            )
        )
    return "\n".join(lines)


def _page_cell(one: Judged) -> str:
    found = one.figures
    if found is None:
        return "does not compile"
    tensor = f", {found.tensor_columns} columns" if found.tensor_columns else ""
    return (
        f"{found.registers} regs, {found.stack_bytes} B, {found.shared_bytes / 1024:.3g} KiB{tensor}, "
        f"{found.instructions} instr"
    )


def traffic_page(recorded: Sequence[Recorded]) -> str:
    """Launches and bytes of each case, beside the fewest bytes that any form must move."""
    names = ("launches", "MB moved", "MB at least", "ratio")
    titles = [f"{side} {name}" for side in ("forward", "backward") for name in names]
    lines = [_row("case", *titles), _row("---", *["---:"] * len(titles))]
    lines += [_row(one.case.label, *_pass_cells(one.forward), *_pass_cells(one.backward)) for one in recorded]
    return "\n".join(lines)


def _pass_cells(made: Pass | None) -> tuple[str, ...]:
    if made is None:
        return ("-",) * 4
    return (
        str(len(made.launches)),
        f"{made.traffic_bytes / 1e6:.4g}",
        f"{made.least_bytes / 1e6:.4g}",
        f"{made.traffic_bytes / made.least_bytes:.2f}",
    )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def write_between(page: Path, parts: Mapping[str, str]) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->` in a page."""
    text = page.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise ValueError(f"{page} needs the lines {begin} and {end}, once each and in this order")
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = f"{before}{begin}\n{part}\n{after}"
    page.write_text(text)
