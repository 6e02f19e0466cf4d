"""The ahead-of-time gate: every kernel is compiled for every target, without a device, and held to its budget.

    python -m mixforge.kernels.ahead_of_time [--targets sm_90,gfx942] [--json FILE] [--write docs/kernels.md]

Exit status: 0 all kernels may be launched, 1 one may not (it says which, where, and by how much), 2 a wrong request.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import triton

from mixforge.kernels.ahead_of_time.cases import CASES, ONCE
from mixforge.kernels.ahead_of_time.compiling import TARGETS
from mixforge.kernels.ahead_of_time.judging import Judged, distinct, judge
from mixforge.kernels.ahead_of_time.recording import Recorded, record
from mixforge.kernels.ahead_of_time.tables import figures_page, terminal, traffic_page, write_between
from mixforge.kernels.launch import interpreting


def main(words: Sequence[str] | None = None) -> int:
    """Run the gate and return its exit status."""
    asked = _asked(words)
    targets: list[str] = asked.targets
    start = time.perf_counter()
    recorded = [record(case, target) for target in targets for case in asked.cases]
    wanted = distinct(recorded)
    _tell(
        f"Triton {triton.__version__}: {len(wanted)} kernels of {len(asked.cases)} cases on {len(targets)} targets"
    )
    judged = judge(wanted, _tell)
    print(terminal(judged))
    first = [one for one in recorded if one.target == targets[0]]
    if asked.json is not None:
        asked.json.write_text(json.dumps(_document(judged, first), indent=1) + "\n")
    if asked.write is not None:
        parts = {"figures": figures_page(judged, targets), "traffic": traffic_page(first)}
        write_between(asked.write, parts)
    failures = [
        f"{one.case.label} launches nothing on {one.target}" for one in recorded if not one.forward.launches
    ]
    failures += [said for one in judged for said in one.failures]
    for said in failures:
        _tell(f"NOT OK: {said}")
    _tell(f"{len(judged)} compiled, {len(failures)} failures, {time.perf_counter() - start:.0f} s")
    return 1 if failures else 0


def _asked(words: Sequence[str] | None) -> argparse.Namespace:
    reader = argparse.ArgumentParser(
        prog="python -m mixforge.kernels.ahead_of_time",
        description="Compile every kernel for every target, without a device, and hold it to its budget.",
    )
    reader.add_argument("--targets", default=",".join(TARGETS), help=f"which of {', '.join(TARGETS)}")
    reader.add_argument("--only", default="", metavar="TEXT", help="only the cases whose label contains it")
    reader.add_argument("--once", action="store_true", help="of each kernel only the case that asks most")
    reader.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    reader.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the tables between the page's markers"
    )
    asked = reader.parse_args(words)
    asked.targets = asked.targets.split(",")
    unknown = [target for target in asked.targets if target not in TARGETS]
    if unknown:
        reader.error(f"unknown target {', '.join(unknown)}; legal targets: {', '.join(TARGETS)}")
    cases = ONCE if asked.once else CASES
    asked.cases = [case for case in cases if asked.only in case.label]
    if not asked.cases:
        reader.error(
            f"no case contains {asked.only!r}; the cases are: {'; '.join(case.label for case in cases)}"
        )
    if interpreting():
        reader.error("kernels that are interpreted cannot be compiled: unset TRITON_INTERPRET")
    return asked


def _document(judged: Sequence[Judged], recorded: Sequence[Recorded]) -> dict[str, object]:
    return {
        "triton": triton.__version__,
        "kernels": [asdict(one) for one in judged],
        "traffic": [
            {
                "case": one.case.label,
                "pass": name,
                "launches": [launch.name for launch in made.launches],
                "traffic_bytes": made.traffic_bytes,
                "least_bytes": made.least_bytes,
            }
            for one in recorded
            for name, made in (("forward", one.forward), ("backward", one.backward))
            if made is not None
        ],
    }


def _tell(text: str) -> None:
    print(f"ahead of time: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
