"""The tuner: for each kernel and shape class, the fastest configuration that is also right, on the device at hand.

A configuration may be only timed after it was run and compared with the reference form on this very device, for
compilers make wrong code of right kernels. One that is wrong, fails or has what gives wrong numbers only at times is
dropped and said so. Candidates run in processes of their own, because after an illegal access a process can use its
device no more: those of a shape class are first compiled and checked, several at a time, then timed, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from queue import SimpleQueue
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from mixforge.kernels.ahead_of_time.case import Case
from mixforge.kernels.ahead_of_time.cases import CASES
from mixforge.kernels.ahead_of_time.compiling import TARGETS, hazards, unit
from mixforge.kernels.ahead_of_time.recording import record
from mixforge.kernels.blocks import Config, ShapeClass, rows_for, trying, write_tuned
from mixforge.kernels.launch import generation

WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3, 4)
# Of a thread of eight warps, so that two programs fit a multiprocessor.
FEWER_REGISTERS = 128
# A wrong kernel is wrong by far more; rounding in the dtype, in chains of products, is less.
RATIOS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Nearer than this, two medians are the same.
GAIN = 0.02
CHECKED_LENGTH = 200
REPEATS = 20
# Blocks of products have at least 16 rows and columns, and twice the largest is beyond the registers.
LEAST_BLOCK, MOST_BLOCK = {"BK": 16, "BV": 16, "BLOCK_K": 16, "BLOCK_B": 16}, 256

Found = TypeVar("Found")
Measure = Callable[[Config], "float | str"]
"""Milliseconds of a right configuration, or why it is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What was found for one shape class."""

    shape: ShapeClass
    default: Config
    default_ms: float | None
    """None where the default itself was dropped."""
    best: Config | None
    """None where nothing was right."""
    best_ms: float | None
    dropped: tuple[tuple[Config, str], ...]

    @property
    def ratio(self) -> float | None:
        """Time of the default over that of the best."""
        if self.default_ms is None or self.best_ms is None:
            return None
        return self.default_ms / self.best_ms


def candidates(shape: ShapeClass, on: str) -> list[Config]:
    """The default, then the table's other configurations, then each with other warps or stages, and on NVIDIA's with
    half of the registers, then the default with one block half or twice as large, under as many warps and under those of
    that share."""
    rows = [row.config for row in rows_for(shape, on)]
    found = list(rows)
    for config in rows:
        found += [replace(config, warps=warps) for warps in _beside(WARPS, config.warps)]
        found += [replace(config, stages=stages) for stages in _beside(STAGES, config.stages)]
        if on.startswith("sm_"):
            found.append(replace(config, registers=0 if config.registers else FEWER_REGISTERS))
    default = rows[0]
    for name, size in default.blocks.items():
        for other in (size // 2, size * 2):
            if LEAST_BLOCK.get(name, 1) <= other <= MOST_BLOCK:
                made = replace(default, blocks={**default.blocks, name: other})
                warps = default.warps * other // size
                found += [made, *([replace(made, warps=warps)] if warps in WARPS else [])]
    return [config for number, config in enumerate(found) if config not in found[:number]]


def _beside(values: Sequence[int], value: int) -> list[int]:
    """The next smaller and the next larger."""
    smaller, larger = [v for v in values if v < value], [v for v in values if v > value]
    return [*smaller[-1:], *larger[:1]]


def select(shape: ShapeClass, tried: Sequence[Config], measure: Measure) -> Tuned:
    """Measure all candidates, the default first, and take the fastest of those that are right.

    The default stays where nothing is faster by more than the noise.
    """
    times: dict[int, float] = {}
    dropped = []
    for number, config in enumerate(tried):
        found = measure(config)
        if isinstance(found, str):
            dropped.append((config, found))
        else:
            times[number] = found
    best = min(times, key=lambda number: times[number], default=None)
    if best is not None and 0 in times and times[0] <= times[best] * (1 + GAIN):
        best = 0
    return Tuned(
        shape=shape,
        default=tried[0],
        default_ms=times.get(0),
        best=None if best is None else tried[best],
        best_ms=None if best is None else times[best],
        dropped=tuple(dropped),
    )


def tune(tell: Callable[[str], None], only: str = "", jobs: int = 1) -> list[Tuned]:
    """Tune all shape classes of this device's cases and write what is best. `jobs` is how many are checked at a time."""
    on, device = generation(), torch.cuda.get_device_name()
    classes = shape_classes(on)
    wanted = {shape: cases for shape, cases in classes.items() if only in shape.name}
    if not wanted:
        raise ValueError(
            f"no shape class contains {only!r}; there are: {', '.join(shape.name for shape in classes)}"
        )
    found = []
    with ExitStack() as stack:
        benches = [stack.enter_context(_Bench()) for _ in range(jobs)]
        for number, (shape, cases) in enumerate(wanted.items(), 1):
            tried = candidates(shape, on)
            tell(f"{number}/{len(wanted)} {shape.name}: {len(tried)} candidates")
            wrong = checked(benches, shape, cases, tried)
            made = select(shape, tried, partial(measured, benches[0], shape, cases, wrong))
            for config, reason in made.dropped:
                tell(f"dropped {shape.name} with {config.text}: {reason}")
            found.append(made)
            if made.best is not None:
                # After each, so that what was found is kept if the next is interrupted.
                write_tuned(device, {shape.name: made.best})
    return found


def measured(
    bench: _Bench,
    shape: ShapeClass,
    cases: Sequence[int],
    wrong: Mapping[str, str | None],
    config: Config,
) -> float | str:
    """Milliseconds of a configuration in which nothing is wrong, and what is wrong with another."""
    reason = wrong[config.text]
    return bench.ask(time_ms, shape, cases, config) if reason is None else reason


def checked(
    benches: Sequence[_Bench], shape: ShapeClass, cases: Sequence[int], tried: Sequence[Config]
) -> dict[str, str | None]:
    """What is wrong with each configuration, by its text, as many at a time as there are processes."""
    free: SimpleQueue[_Bench] = SimpleQueue()
    for bench in benches:
        free.put(bench)

    def one(config: Config) -> str | None:
        bench = free.get()
        try:
            return bench.ask(check, shape, cases, config)
        finally:
            free.put(bench)

    with ThreadPoolExecutor(len(benches)) as threads:
        return dict(zip((config.text for config in tried), threads.map(one, tried), strict=True))


def shape_classes(on: str) -> dict[ShapeClass, tuple[int, ...]]:
    """The numbers of the cases that ask for each shape class, of the cases that have a reference."""
    found: dict[ShapeClass, tuple[int, ...]] = {}
    for number, case in enumerate(CASES):
        if case.reference is not None:
            with trying({}) as trial:
                record(case, on)
            for shape in trial.asked:
                found[shape] = (*found.get(shape, ()), number)
    return found


class _Bench:
    """A process that measures, and a new one when it breaks."""

    def __enter__(self) -> _Bench:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def ask(self, work: Callable[..., Found], *given: object) -> Found | str:
        """What `work` returns there, or why it failed."""
        waiting = self._pool.submit(work, *given)
        error = waiting.exception()
        if error is None:
            return waiting.result()
        self._pool.shutdown()
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        said = str(error).strip().splitlines()
        return f"{type(error).__name__}: {said[0] if said else 'no reason given'}"


def check(shape: ShapeClass, cases: Sequence[int], config: Config) -> str | None:
    """What is wrong with a configuration: with what is compiled of it, or with its results."""
    with trying({shape: config}):
        for number in cases:
            found = compiled_wrong(CASES[number], shape.kernel)
            if found is not None:
                return found
        for number in cases:
            made = shorter(CASES[number], shape, generation())
            expected = _expected(number, made.sizes["B"])
            wrong = compare(_results(replace(made, device="cuda"), None), expected, made.dtype)
            if wrong is not None:
                return wrong
    return None


def compiled_wrong(case: Case, kernel: str) -> str | None:
    """What a kernel of a case has that gives wrong numbers, perhaps not when it is checked."""
    on = generation()
    if on not in TARGETS:
        return None
    made = record(case, on)
    for one in (made.forward, made.backward):
        for launch in () if one is None else one.launches:
            if launch.name == kernel and (said := hazards(unit(launch, on))):
                return said[0]
    return None


def time_ms(shape: ShapeClass, cases: Sequence[int], config: Config) -> float:
    """Milliseconds of the cases together, forward and backward."""
    with trying({shape: config}):
        return sum(_time_ms(replace(CASES[number], device="cuda")) for number in cases)


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
    """What differs from what is expected by more than rounding, as a ratio of RMS errors."""
    for name, right in expected.items():
        error = (found[name].double() - right.double()).square().mean().sqrt().item()
        scale = right.double().square().mean().sqrt().item()
        # Written so that NaN is wrong.
        if not error <= RATIOS[dtype] * max(scale, 1e-30):
            return f"{name} is wrong by {error:.3g} of {scale:.3g}, at most a {RATIOS[dtype]:g}th is rounding"
    return None


@cache
def _expected(number: int, batch: int) -> dict[str, Tensor]:
    """What the reference form makes of a case in float64, with so many sequences."""
    case = CASES[number]
    assert case.reference is not None
    return _results(replace(_cut(case, batch), device="cuda"), case.reference)


def shorter(case: Case, shape: ShapeClass, on: str) -> Case:
    """A case at a length that the reference form can run, with as few sequences as still launch a shape class of its.

    Which kernels the linear family launches depends on how many heads there are in all.
    """
    batch = min(case.sizes["B"], 2)
    while batch < case.sizes["B"] and not _asks(_cut(case, batch), shape, on):
        batch = min(2 * batch, case.sizes["B"])
    return _cut(case, batch)


def _cut(case: Case, batch: int) -> Case:
    return replace(case, sizes={**case.sizes, "B": batch, "T": CHECKED_LENGTH})


def _asks(case: Case, shape: ShapeClass, on: str) -> bool:
    """Whether a case launches a shape class."""
    with trying({}) as trial:
        record(case, on)
    return shape in trial.asked


def _results(case: Case, reference: Callable[..., object] | None) -> dict[str, Tensor]:
    """Outputs and gradients of a case, by the function of its own or by the reference in float64."""
    torch.manual_seed(0)
    function, args = case.call(case)
    if reference is not None:
        function = reference
        args = [_wide(arg) if isinstance(arg, Tensor) else arg for arg in args]
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    # Rounded as the kernels would get them, also where the reference takes them in float64.
    weights = torch.empty(outputs[0].shape, device=case.device).uniform_(-1, 1)
    weights = weights.to(case.dtype).to(outputs[0].dtype)
    gradients = torch.autograd.grad(outputs[0], leaves, weights)
    named = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    return named | {f"gradient {number}": gradient for number, gradient in enumerate(gradients)}


def _wide(arg: Tensor) -> Tensor:
    return arg.detach().double().requires_grad_(arg.requires_grad)


def _time_ms(case: Case) -> float:
    """Median of the forward and backward passes of a case."""
    function, args = case.call(case)
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]

    def run() -> None:
        outputs = function(*args)
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        torch.autograd.grad(output, leaves, torch.ones_like(output))

    for _ in range(3):
        run()
    return median(_events_ms(run))


def _events_ms(run: Callable[[], None]) -> Iterator[float]:
    for _ in range(REPEATS):
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        yield start.elapsed_time(end)
