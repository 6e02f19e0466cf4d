"""The documentation's examples run, in order, in an empty folder that has only `examples/`.

README.md comes first: it searches a tiny campaign, and everything after it asks about what that found, up to an
exported model that generates text. A fenced block marked `sh` is run line by line (its commands must exit with 0), a
block marked `python` in one interpreter a page. Other fences (`text`, `toml`, `bash`) are not run. A line that is there
twice is run once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", made / "examples")
    return made


def run(command: list[str] | str, folder: Path) -> subprocess.CompletedProcess[str]:
    scripts = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        shell=isinstance(command, str),
        capture_output=True,
        text=True,
        # A model that has seen little text writes bytes that are no UTF-8.
        errors="replace",
        timeout=600,
    )


@pytest.fixture(scope="session")
def seen() -> set[str]:
    """Lines that were run."""
    return set()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_every_example_runs(page: str, folder: Path, seen: set[str]) -> None:
    blocks = FENCE.findall((ROOT / page).read_text())
    for language, block in blocks:
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#") and line not in seen:
                    seen.add(line)
                    done = run(line, folder)
                    assert done.returncode == 0, f"{page}: {line}\n{done.stdout}\n{done.stderr}"
    python = "\n".join(block for language, block in blocks if language == "python")
    if python:
        done = run([sys.executable, "-c", python], folder)
        assert done.returncode == 0, f"{page}:\n{python}\n{done.stdout}\n{done.stderr}"


def test_pages_name_files_that_exist() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_left_unfinished(page: str) -> None:
    left = re.findall(r"^(?:[A-Z]{3,}|.*\b(?:TODO|TBD|FIXME)\b.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert not left, f"{page} has placeholders: {left}"
