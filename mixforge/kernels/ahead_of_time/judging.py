"""Compiling many kernels at a time, and judging each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

from mixforge.kernels.ahead_of_time.budgets import Figures, over_budget
from mixforge.kernels.ahead_of_time.compiling import TARGETS, Unit, compile_units, unit
from mixforge.kernels.ahead_of_time.recording import Recorded

WORKERS = 2
GROUP = 8
"""How many are compiled in one go for Nvidia's targets. They share a start of the disassembler; others share nothing."""

Made = Figures | BaseException


@dataclass(frozen=True, slots=True)
class Wanted:
    """A compilation, and the label of the first case that needs it."""

    unit: Unit
    launched_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One kernel compiled for one target."""

    kernel: str
    target: str
    launched_by: str
    """The label of the first case that launches it."""
    warps: int
    stages: int
    figures: Figures | None
    """None where it does not compile."""
    failures: tuple[str, ...]


def distinct(recorded: Sequence[Recorded]) -> list[Wanted]:
    """Each compilation that the launches need, once."""
    found: dict[str, Wanted] = {}
    for one in recorded:
        passes = [one.forward] if one.backward is None else [one.forward, one.backward]
        for launch in (launch for made in passes for launch in made.launches):
            made = unit(launch, one.target)
            found.setdefault(made.key, Wanted(made, one.case.label))
    return list(found.values())


def judge(wanted: Sequence[Wanted], tell: Callable[[str], None], workers: int = WORKERS) -> list[Judged]:
    """Compile all, some at a time, and hold the figures to their budgets. In the order that was given."""
    made: dict[int, Made] = {}
    for number, result in _compiled([one.unit for one in wanted], workers):
        made[number] = result
        asked = wanted[number].unit
        took = f"{result.compile_s:.1f} s" if isinstance(result, Figures) else "failed"
        tell(f"{len(made)}/{len(wanted)} {asked.kernel} {asked.target} {took}")
    return [_judged(one, made[number]) for number, one in enumerate(wanted)]


def _judged(one: Wanted, made: Made) -> Judged:
    kernel, target = one.unit.kernel, one.unit.target
    if isinstance(made, Figures):
        is_wide = not any(kind in ("*bf16", "*fp16") for kind in one.unit.signature.values())
        failures = [f"{said} ({one.launched_by})" for said in over_budget(kernel, target, made, is_wide)]
    else:
        lines = [line for line in str(made).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else "no reason given"
        failures = [
            f"{kernel} on {target} does not compile ({one.launched_by}): {type(made).__name__}: {reason}"
        ]
    return Judged(
        kernel=kernel,
        target=target,
        launched_by=one.launched_by,
        warps=one.unit.options["num_warps"],
        stages=one.unit.options["num_stages"],
        figures=made if isinstance(made, Figures) else None,
        failures=tuple(failures),
    )


def _compiled(units: Sequence[Unit], workers: int) -> Iterator[tuple[int, Made]]:
    """Figures or the error of each unit, as they are made.

    One that does not compile takes along what was compiled with it, and a compiler that aborts its whole pool, so these
    are then compiled alone.
    """
    lost: list[int] = []
    for numbers, made in _pooled(units, _groups(units), workers):
        if not isinstance(made, BaseException):
            yield from zip(numbers, made, strict=True)
        elif len(numbers) == 1 and not isinstance(made, BrokenProcessPool):
            yield numbers[0], made
        else:
            lost += numbers
    for number in lost:
        for _, made in _pooled(units, [[number]], 1):
            yield number, made if isinstance(made, BaseException) else made[0]


def _groups(units: Sequence[Unit]) -> list[list[int]]:
    """The numbers of units that are compiled together, which are of one target; the smallest lots last."""
    targets: dict[str, list[int]] = {}
    for number, one in enumerate(units):
        targets.setdefault(one.target, []).append(number)
    groups: list[list[int]] = []
    for target, each in targets.items():
        size = GROUP if TARGETS[target].backend == "cuda" else 1
        groups += (each[start : start + size] for start in range(0, len(each), size))
    return sorted(groups, key=len, reverse=True)


def _pooled(
    units: Sequence[Unit], groups: Sequence[list[int]], workers: int
) -> Iterator[tuple[list[int], list[Figures] | BaseException]]:
    # Spawned, because a fork of a process that has started threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        numbers = {pool.submit(compile_units, [units[number] for number in group]): group for group in groups}
        for future in as_completed(numbers):
            yield numbers[future], future.exception() or future.result()
