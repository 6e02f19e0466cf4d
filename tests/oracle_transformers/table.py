"""Write the table of measured differences into docs/oracles.md.

.venv-transformers/bin/python tests/oracle_transformers/table.py docs/oracles.md
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from classes import CLASSES, Size
from comparison import compare

BEGIN, END = "<!-- transformers: begin -->", "<!-- transformers: end -->"


def rows() -> list[str]:
    """One for each class, in Markdown."""
    found = [
        "| class | as an architecture | a sequence | prefill and steps |",
        "|---|---|---|---|",
    ]
    for name, make in CLASSES.items():
        config = make(Size())
        with tempfile.TemporaryDirectory() as folder:
            result = compare(config, Path(folder))
        text = str(result.checkpoint.architecture).replace("|", "\\|")
        found.append(f"| {name} | `{text}` | {result.sequence:.1e} | {result.steps:.1e} |")
    return found


def main(path: Path) -> None:
    """Replace what stands between the two marks."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    table = "\n".join(rows())
    path.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
