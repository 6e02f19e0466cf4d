"""Launches and bytes of our kernels against those of fla-core's, as benchmarks/traffic.py writes them down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "traffic.py"
pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="interpreted kernels are not launched"
)
# What fla-core has of the linear family: all but a fixed decay under the rule delta.
COMBINATIONS = 7
# Of sequences, and of steps.
SIZES = 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("traffic") / "rows.json"
    command = [sys.executable, str(SCRIPT), "--only", "^linear ", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["rows"]


def pairs(rows: list[dict[str, Any]], has_backward: bool) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each form of fla's, and ours of the same combination."""
    found = [row for row in rows if (row["both"] is not None) == has_backward]
    ours = {(row["variant"], row["size"]): row for row in found if row["form"] == "triton"}
    assert len({variant for variant, _ in ours}) == COMBINATIONS
    assert len({size for _, size in ours}) == SIZES
    return [(row, ours[row["variant"], row["size"]]) for row in found if row["form"] != "triton"]


def launches(made: dict[str, Any]) -> int:
    return made["triton"] + made["torch"]


def test_a_sequence_takes_no_more_launches_or_bytes(rows):
    for theirs, ours in pairs(rows, has_backward=True):
        # Of one long sequence both write each state once and read it once, in two launches.
        is_even = ours["size"].startswith("B1 ")
        for name in ("forward", "both"):
            least = 0 if is_even and name == "forward" else 1
            assert launches(theirs[name]) - launches(ours[name]) >= least, (ours, theirs)
            assert theirs[name]["bytes"] - ours[name]["bytes"] >= least, (ours, theirs)


def test_a_step_is_one_launch_and_moves_half_the_bytes(rows):
    for theirs, ours in pairs(rows, has_backward=False):
        assert launches(ours["forward"]) == 1
        assert 1.9 * ours["forward"]["bytes"] < theirs["forward"]["bytes"], (ours, theirs)


def test_nothing_of_ours_is_tuned_and_all_is_recorded(rows):
    for row in rows:
        for made in (row["forward"], row["both"]):
            if made is not None:
                assert len(made["names"]) == launches(made)
                assert made["tuned"] == 0 or row["form"] != "triton"
    assert any(row["forward"]["tuned"] for row in rows)
