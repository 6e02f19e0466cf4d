"""Our kernels, their torch forms, fla-core where it is installed and SDPA, side by side on a GPU.

    python benchmarks/kernels.py [--json FILE] [--quick] [--repeats 20] [--only PATTERN] [--jobs 8]

bfloat16. Each form is first held against the reference form in float64, with its gradients; where one of ours is wrong,
nothing is timed and the exit status is 1. All forms of a size are timed in turn, captured in a graph and not, on copies
of the inputs that are together beyond the L2. The floor is the time in which the bytes of inputs and outputs are copied,
at the bandwidth of a copy in this run. Forms are checked in `--jobs` processes apart: fla's tuner never chooses again for
another length, so that this one must first meet it at the length that is timed. Without a GPU the exit status is 2.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from on_gpu.cases import Case, cases
from on_gpu.measuring import (
    Gpu,
    Spread,
    call,
    copies,
    first_line,
    interleaved,
    outputs_of,
    prepare,
    size_of,
    spread,
    wrong,
)
from on_gpu.rivals import compile_only, fla_version

from mixforge.evaluator.environment import environment

DTYPE = torch.bfloat16
OURS = ("triton", "torch")
# What is asked: of fla's time, of the published neighbour's, and of the copy bandwidth by a step of 64 sequences.
FLA_GOAL, DELTA_GOAL, NEIGHBOUR_GOAL, STEP_GOAL = 1.0, 1.2, 1.1, 0.7
UNPUBLISHED = {"head, delta": "scalar, delta"}

Ask = Callable[[Sequence[tuple[int, str]]], Iterable["str | None"]]
"""Of numbers of cases and forms: why each is not timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One form of one case in one phase; `both` is forward and backward."""

    op: str
    variant: str
    size: str
    phase: str
    form: str
    floor_bytes: int
    floor_ms: float
    eager: Spread
    captured: Spread | None
    not_captured: str | None

    @property
    def best(self) -> Spread:
        """Captured, where it can be."""
        return self.captured or self.eager

    @property
    def of_floor(self) -> float:
        """The floor's part of the time."""
        return self.floor_ms / self.best.median_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A form that was not timed, and why."""

    label: str
    form: str
    reason: str


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check(found: Sequence[Case], ask: Ask) -> tuple[dict[tuple[str, str], str], list[Dropped]]:
    """What is wrong, by label and form, and the same as a list."""
    asked = [(number, name) for number, case in enumerate(found) for name in case.forms]
    dropped = [
        Dropped(label=found[number].label, form=name, reason=reason)
        for (number, name), reason in zip(asked, ask(asked), strict=True)
        if reason is not None
    ]
    return {(each.label, each.form): each.reason for each in dropped}, dropped


def in_processes(jobs: int, device: torch.device, *chosen: object) -> Ask:
    """Each form is also run at its own size there: this process then finds it compiled, on the disk."""

    def ask(asked: Sequence[tuple[int, str]]) -> list[str | None]:
        tell(f"compile and check {len(asked)} forms, {jobs} at a time")
        # Each in a process of its own: after an illegal access nothing works in one. Loading torch takes longer than many
        # a check, so that they are forks of a process that has loaded it and has not touched the device.
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch._dynamo", "triton"])
        with ProcessPoolExecutor(
            jobs, mp_context=context, initializer=compile_only, max_tasks_per_child=1
        ) as pool:
            return list(pool.map(partial(look_and_run, device, *chosen), asked))

    return ask


def look_and_run(
    device: torch.device, quick: bool, only: str, without: str, asked: tuple[int, str]
) -> str | None:
    number, name = asked
    case = choose(quick, only, without)[number]
    tell(f"check {case.label}: {name}")
    said = look(case, name, device)
    if said is None and name != "torch":
        inputs = case.draw(case.size, device, DTYPE)
        try:
            for phase in case.phases:
                output = torch.zeros_like(outputs_of(case.forms[name], inputs)[0])
                call(case.forms[name], phase, inputs, output)()
        except Exception as error:
            # Others are at work and may hold the memory. What is not compiled yet is compiled when it is timed.
            tell(f"{case.label}, {name}: {first_line(error)}")
    return said


def look(case: Case, name: str, device: torch.device) -> str | None:
    """Why a form is not timed, where it is wrong or fails.

    A rival that refuses its backward pass here, as fla does some under Triton 3.6, is held to its output alone.
    """
    try:
        return wrong(case, case.forms[name], DTYPE, device)
    except Exception as error:
        if name in OURS:
            return first_line(error)
    try:
        return wrong(case, case.forms[name], DTYPE, device, gradients=False)
    except Exception as error:
        return first_line(error)


def choose(quick: bool, only: str, without: str) -> list[Case]:
    """The cases that are asked for, with their forms."""
    return [
        replace(
            case, forms={name: form for name, form in case.forms.items() if not re.fullmatch(without, name)}
        )
        for case in cases(quick)
        if re.search(only, case.label)
    ]


def red(dropped: Sequence[Dropped]) -> list[Dropped]:
    """Those of ours."""
    return [each for each in dropped if each.form in OURS]


def time_size(
    together: Sequence[Case], gpu: Any, bad: dict[tuple[str, str], str], repeats: int, gb_s: float
) -> tuple[list[Row], list[Dropped]]:
    """All forms of all cases of one size, in turn."""
    ready, spans, dropped = {}, {}, []
    for number, case in enumerate(together):
        drawn = [case.draw(case.size, gpu.device, DTYPE)]
        drawn += [
            case.draw(case.size, gpu.device, DTYPE)
            for _ in range(copies(size_of(drawn[0]), gpu.l2_bytes) - 1)
        ]
        for phase in case.phases:
            for name, operation in case.forms.items():
                if (case.label, name) in bad:
                    continue
                tell(f"prepare {case.label} {phase}: {name}")
                try:
                    made = prepare(gpu, case, phase, operation, drawn)
                except Exception as error:
                    dropped.append(Dropped(label=case.label, form=name, reason=first_line(error)))
                    continue
                key = (number, phase, name)
                ready[key] = made
                spans.update({(key, mode): span for mode, span in made.spans.items()})
    tell(f"time {len(spans)} spans, {repeats} times each")
    took = interleaved(spans, repeats)
    rows = []
    for key, made in ready.items():
        number, phase, name = key
        case, captured = together[number], took.get((key, "captured"))
        rows.append(
            Row(
                op=case.op,
                variant=case.variant,
                size=case.size.text,
                phase=phase,
                form=name,
                floor_bytes=made.bytes,
                floor_ms=made.bytes / gb_s / 1e6,
                eager=spread(took[key, "eager"]),
                captured=None if captured is None else spread(captured),
                not_captured=made.not_captured,
            )
        )
    return rows, dropped


HEADING = (
    f"{'operation':<30}{'size':<22}{'phase':<9}{'form':<32}{'captured ms':>12}{'quartiles':>19}{'eager ms':>11}"
    f"{'floor ms':>10}{'of floor':>10}{'x triton':>10}"
)


def table(rows: Sequence[Row]) -> str:
    """As people read it; `x triton` is the form's time over that of ours."""
    lines = [HEADING]
    for row in rows:
        ours = [each for each in rows if place(each) == place(row) and each.form == "triton"]
        low, high = row.best.quartiles_ms
        ratio = f"{row.best.median_ms / ours[0].best.median_ms:.2f}" if ours else "-"
        captured = "-" if row.captured is None else f"{row.captured.median_ms:.4f}"
        name = f"{row.op} ({row.variant})" if row.variant else row.op
        lines.append(
            f"{name:<30}{row.size:<22}{row.phase:<9}{row.form:<32}{captured:>12}{f'{low:.4f} {high:.4f}':>19}"
            f"{row.eager.median_ms:>11.4f}{row.floor_ms:>10.4f}{row.of_floor:>10.1%}{ratio:>10}"
        )
    return "\n".join(lines)


def place(row: Row) -> tuple[str, str, str, str]:
    """Rows of one place are forms of the same."""
    return row.op, row.variant, row.size, row.phase


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What is asked of our kernels, held against the figures."""
    ours = {place(row): row for row in rows if row.form == "triton"}
    lines = []
    for key, row in ours.items():
        rivals = [each for each in rows if place(each) == key and each.form.startswith("fla ")]
        if rivals:
            best = min(rivals, key=lambda each: each.best.median_ms)
            is_small = row.op == "linear" and row.size.startswith(("B64 T256 ", "B32 T512 "))
            goal = DELTA_GOAL if row.variant == "scalar, delta" or is_small else FLA_GOAL
            goal = FLA_GOAL if row.phase == "step" else goal
            lines.append(verdict(key, f"{best.form} / ours", best.best.median_ms / row.best.median_ms, goal))
        neighbour = ours.get((row.op, UNPUBLISHED.get(row.variant, ""), row.size, row.phase))
        if neighbour is not None:
            ratio = row.best.median_ms / neighbour.best.median_ms
            lines.append(verdict(key, f"ours / {neighbour.variant}", ratio, NEIGHBOUR_GOAL, at_most=True))
        if row.phase == "step" and row.size.startswith("B64 "):
            lines.append(verdict(key, "of the copy bandwidth", row.of_floor, STEP_GOAL))
    return lines


def verdict(key: tuple[str, ...], what: str, value: float, goal: float, at_most: bool = False) -> str:
    is_met = value <= goal if at_most else value >= goal
    where = " ".join(part for part in key if part)
    return f"{'ok  ' if is_met else 'MISS'} {where}: {what} {value:.2f}, {'at most' if at_most else 'at least'} {goal}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures, with every repeat, to this file")
    parser.add_argument("--quick", action="store_true", help="small sizes only, 5 repeats")
    parser.add_argument("--repeats", type=int, help="of every span (default: 20)")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="cases in whose label this regular expression is found"
    )
    parser.add_argument(
        "--without",
        default="",
        metavar="PATTERN",
        help="leave out forms with this for a whole name: 'torch|sdpa'",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="processes that compile and check, each with its own copy of the inputs",
    )
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        tell("benchmarks/kernels.py times kernels on a GPU, and torch sees none here: nothing is timed")
        return 2
    repeats = asked.repeats or (5 if asked.quick else 20)
    gpu = Gpu()
    selection = asked.quick, asked.only, asked.without
    chosen = choose(*selection)
    if not chosen:
        tell(f"no case has {asked.only!r}; there are: {', '.join(case.label for case in cases(asked.quick))}")
        return 1
    bad, dropped = check(chosen, in_processes(asked.jobs, gpu.device, *selection))
    if red(dropped):
        for each in red(dropped):
            tell(f"WRONG {each.label}, {each.form}: {each.reason}")
        tell("our own forms are wrong on this device; nothing is timed")
        return 1
    where = environment("cuda")
    gb_s = gpu.copy_gb_s()
    versions = f"torch {where.torch}, Triton {where.triton}, fla-core {fla_version()}"
    print(f"{where.device}, driver {where.driver}, {versions}, commit {where.commit}, bfloat16")
    print(
        f"copy {gb_s:.0f} GB/s, L2 {gpu.l2_bytes / 2**20:.0f} MiB, medians of {repeats} interleaved repeats"
    )
    rows: list[Row] = []
    for size, together in groupby(chosen, key=lambda case: case.size):
        tell(size.text)
        made, failed = time_size(list(together), gpu, bad, repeats, gb_s)
        rows, dropped = rows + made, dropped + failed
        torch.cuda.empty_cache()
        if asked.json is not None:
            # After each size, so that what was measured is kept if the next is interrupted.
            record = {
                "command": " ".join(["python", *sys.argv]),
                "environment": asdict(where),
                "fla_core": fla_version(),
                "dtype": "bfloat16",
                "copy_gb_s": gb_s,
                "l2_bytes": gpu.l2_bytes,
                "repeats": repeats,
                "rows": [asdict(row) for row in rows],
                "dropped": [asdict(each) for each in dropped],
                "verdicts": verdicts(rows),
            }
            asked.json.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    for each in dropped:
        print(f"not timed: {each.label}, {each.form}: {each.reason}")
    print("\n".join(verdicts(rows)))
    return 1 if any(each.form == "triton" for each in dropped) else 0


if __name__ == "__main__":
    sys.exit(main())
