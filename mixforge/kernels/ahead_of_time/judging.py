"""Compiling many kernels at a time, and judging each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

from mixforge.kernels.ahead_of_time.budgets import Figures, over_budget
from mixforge.kernels.ahead_of_time.compiling import Unit, compile_unit, unit
from mixforge.kernels.ahead_of_time.recording import Recorded

WORKERS = 2

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

    A compiler that aborts takes its whole pool along, so what was in it is then compiled in pools of one.
    """
    lost = []
    for number, made in _pooled(dict(enumerate(units)), workers):
        if isinstance(made, BrokenProcessPool):
            lost.append(number)
        else:
            yield number, made
    for number in lost:
        yield from _pooled({number: units[number]}, 1)


def _pooled(units: dict[int, Unit], workers: int) -> Iterator[tuple[int, Made]]:
    # Spawned, because a fork of a process that has started threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        numbers = {pool.submit(compile_unit, one): number for number, one in units.items()}
        for future in as_completed(numbers):
            yield numbers[future], future.exception() or future.result()
