"""What the kernels of a case make each warp do on an NVIDIA GPU, counted in their compiled code: no device is needed.

    python benchmarks/instructions.py [--only TEXT] [--kernel NAME] [--target sm_90] [--json FILE]

For each kernel: registers, bytes of the stack, warps of a program, programs that fit a multiprocessor beside one another,
and the instructions of its outermost loops and of what is outside them, by kind. Loops within loops are counted once, as
they stand in the code. Times do not follow from this, but what waits does: barriers (BAR), exchanges between threads
(SHFL, LDS, STS) and spilled registers (LDL, STL) within a loop, and few programs to wait beside.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from mixforge.kernels.ahead_of_time.budgets import LIMITS
from mixforge.kernels.ahead_of_time.cases import CASES
from mixforge.kernels.ahead_of_time.compiling import compile_sass, unit
from mixforge.kernels.ahead_of_time.recording import record

# Of a multiprocessor: registers, and warps at most (CUDA C++ Programming Guide, technical specifications).
REGISTERS, WARPS = 65_536, 64
# Shared memory that the system keeps of each program.
RESERVED = 1_024
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_GOAL = re.compile(r"`\((\.L_x_\d+)\)")
_NAMED = (
    "BAR",
    "SHFL",
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "LDG",
    "STG",
    "LDL",
    "STL",
    "MUFU",
    "HMMA",
    "HGMMA",
    "LDGSTS",
)


@dataclass(frozen=True, slots=True)
class Counted:
    """One kernel of a case."""

    case: str
    kernel: str
    config: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    programs_beside: int
    loops: tuple[dict[str, int], ...]
    outside: dict[str, int]


def by_kind(names: list[str]) -> dict[str, int]:
    """How many instructions there are, and of those that wait or move data each kind."""
    counts = Counter(name.partition(".")[0] for name in names)
    return {"all": len(names) - counts["NOP"], **{kind: counts[kind] for kind in _NAMED if counts[kind]}}


def loops_of(code: str) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Instructions of the outermost loops, each from where a branch leads back to, and of what is in none."""
    names: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := _LINE.match(line):
            goal = _GOAL.search(found[2]) if found[1].startswith("BRA") else None
            # A branch to itself ends the code.
            if goal and labels.get(goal[1], len(names)) < len(names):
                spans.append((labels[goal[1]], len(names) + 1))
            names.append(found[1])
    outer = [a for a in spans if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in spans)]
    inside = {number for first, last in outer for number in range(first, last)}
    rest = [name for number, name in enumerate(names) if number not in inside]
    return [by_kind(names[first:last]) for first, last in outer], by_kind(rest)


def count(target: str, only: str, kernel: str) -> list[Counted]:
    found: dict[str, Counted] = {}
    for case in CASES:
        if only not in case.label:
            continue
        recorded = record(case, target)
        backward = [] if recorded.backward is None else recorded.backward.launches
        for launch in [*recorded.forward.launches, *backward]:
            one = unit(launch, target)
            if kernel not in launch.name or one.key in found:
                continue
            figures, code = compile_sass(one)
            loops, outside = loops_of(code)
            warps = launch.config.warps
            beside = min(
                REGISTERS // (figures.registers * 32 * warps),
                LIMITS[target].shared_bytes // (figures.shared_bytes + RESERVED),
                WARPS // warps,
            )
            found[one.key] = Counted(
                case.label, launch.name, launch.config.text, figures.registers, figures.stack_bytes,
                figures.shared_bytes, beside, tuple(loops), outside,
            )  # fmt: skip
            told = found[one.key]
            print(f"{told.kernel}: {told.case}; {told.config}")
            print(
                f"  {told.registers} registers, {told.stack_bytes} B of stack, {told.shared_bytes} B of shared memory, "
                f"{beside} programs beside one another"
            )
            for name, kinds in [
                *((f"loop {n}", each) for n, each in enumerate(loops, 1)),
                ("outside", outside),
            ]:
                print(
                    f"  {name:8}", ", ".join(f"{kind} {number}" for kind, number in kinds.items()), flush=True
                )
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose label contains it")
    parser.add_argument("--kernel", default="", metavar="NAME", help="kernels whose name contains it")
    parser.add_argument(
        "--target", default="sm_90", choices=[name for name in LIMITS if name.startswith("sm_")]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    asked = parser.parse_args()
    found = count(asked.target, asked.only, asked.kernel)
    if not found:
        print(
            f"error: no case contains {asked.only!r} with a kernel named {asked.kernel!r}; leave one out",
            file=sys.stderr,
        )
        return 2
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
