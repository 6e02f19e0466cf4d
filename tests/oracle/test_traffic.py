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


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("traffic") / "rows.json"
    command = [sys.executable, str(SCRIPT), "--only", "^linear .*(B8 T4096|B64 H16)", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["rows"]


def pairs(rows: list[dict[str, Any]], has_backward: bool) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each form of fla's, and ours of the same combination."""
    found = [row for row in rows if (row["backward"] is not None) == has_backward]
    ours = {row["variant"]: row for row in found if row["form"] == "triton"}
    assert len(ours) == COMBINATIONS
    return [(row, ours[row["variant"]]) for row in found if row["form"] != "triton"]


def launches(made: dict[str, Any]) -> int:
    return made["triton"] + made["torch"]


def test_a_sequence_takes_fewer_launches_and_moves_fewer_bytes(rows):
    for theirs, ours in pairs(rows, has_backward=True):
        for name in ("forward", "backward"):
            assert launches(ours[name]) < launches(theirs[name]), (ours, theirs)
            assert ours[name]["bytes"] < theirs[name]["bytes"], (ours, theirs)


def test_a_step_is_one_launch_and_moves_half_the_bytes(rows):
    for theirs, ours in pairs(rows, has_backward=False):
        assert launches(ours["forward"]) == 1
        assert 1.9 * ours["forward"]["bytes"] < theirs["forward"]["bytes"], (ours, theirs)


def test_nothing_of_ours_is_tuned_and_all_is_recorded(rows):
    for row in rows:
        for made in (row["forward"], row["backward"]):
            if made is not None:
                assert len(made["names"]) == launches(made)
                assert made["tuned"] == 0 or row["form"] != "triton"
    assert any(row["forward"]["tuned"] for row in rows)
