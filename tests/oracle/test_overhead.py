"""Python of our calls beside fla-core's, as benchmarks/overhead.py times it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overhead.py"
pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="interpreted kernels are not launched"
)


def test_every_form_of_a_case_is_timed(tmp_path):
    file = tmp_path / "rows.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--only",
        "^(linear|norm) .*(scalar, delta|gated)",
        "--json",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["op"], row["form"].removeprefix("fla "), row["both_us"] is None) for row in rows] == [
        ("linear", "triton", False),
        ("linear", "chunk_gated_delta_rule", False),
        ("norm", "triton", False),
        ("norm", "rms_norm_gated", False),
        ("linear", "triton", True),
        ("linear", "fused_recurrent_gated_delta_rule", True),
    ]
    for row in rows:
        # A call that launched, or compiled, would take milliseconds.
        assert 1 < row["forward_us"] < (row["both_us"] or 1000) < 20_000, row


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "nothing"), "no case is found by 'nothing'"),
        (("--only", "("), "--only '(' is no regular expression"),
        (("--json", "nowhere/rows.json"), "--json 'nowhere/rows.json' lies in no folder"),
    ],
)
def test_bad_words_are_said_before_anything_is_timed(words, said):
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
