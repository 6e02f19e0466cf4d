"""How a case is checked and timed on a GPU: copies of the inputs beyond the L2, events, graphs, interleaved repeats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from on_gpu.cases import Case, Inputs, Operation, Phase, Size

# RMS error over RMS, of outputs and gradients against the reference in float64. A wrong kernel is wrong by far more.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Longer than every window, and no multiple of a block.
CHECKED_LENGTH = 601
# Where a token's state is a matrix for each head, of which the reference keeps several in float64 for its gradients.
MATRIX_LENGTH, MATRIX_STATES = 130, ("linear", "dplr", "twofold_linear")
# Inputs of a call are met again when as many bytes as this many L2 caches have gone by.
CACHES = 2
MOST_COPIES = 128
# What one pair of events spans, so that neither their own cost nor that of starting a graph counts.
SPAN_MS = 10.0
MOST_CALLS = 512
# A call of this long is repeated less: what it is held against is far away.
SLOW_MS, FEW_REPEATS = 50.0, 3

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Milliseconds of one call."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    repeats_ms: tuple[float, ...]


def spread(repeats: Sequence[float]) -> Spread:
    low, _, high = statistics.quantiles(repeats, n=4) if len(repeats) > 1 else [repeats[0]] * 3
    return Spread(median_ms=statistics.median(repeats), quartiles_ms=(low, high), repeats_ms=tuple(repeats))


def copies(call_bytes: int, l2_bytes: int) -> int:
    """How many copies of the inputs are taken in turn."""
    return min(MOST_COPIES, max(2, 1 + math.ceil(CACHES * l2_bytes / call_bytes)))


def calls(count: int, call_ms: float) -> int:
    """Calls of one span: each copy equally often, for about `SPAN_MS`."""
    rounds = round(SPAN_MS / max(call_ms, 1e-6) / count)
    return count * max(1, min(rounds, MOST_CALLS // count))


def floor_bytes(phase: Phase, inputs: int, gradients: int, output: int, state: int) -> int:
    """Bytes that an operation cannot do without: each input read once, each output written once.

    Backward reads the inputs and the output's gradient. A step reads its state as one of the inputs, and writes it.
    """
    if phase == "forward":
        return inputs + output
    return inputs + output + state if phase == "step" else 2 * inputs + gradients + 2 * output


def size_of(tensors: Sequence[Tensor | None]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def interleaved(spans: Mapping[Key, Callable[[], float]], repeats: int) -> dict[Key, list[float]]:
    """Every span once in each repeat, so that what changes with time falls on all. Slow ones take part in a few."""
    found: dict[Key, list[float]] = {key: [] for key in spans}
    for repeat in range(repeats):
        for key, span in spans.items():
            if repeat < FEW_REPEATS or found[key][0] < SLOW_MS:
                found[key].append(span())
    return found


def outputs_of(operation: Operation, inputs: Inputs) -> tuple[Tensor, ...]:
    made = operation(*inputs)
    return made if isinstance(made, tuple) else (made,)


def wrong(
    case: Case, operation: Operation, dtype: torch.dtype, device: torch.device, gradients: bool = True
) -> str | None:
    """What differs from the reference form in float64 on a shorter input of the same heads; None where nothing does."""
    length = MATRIX_LENGTH if case.op in MATRIX_STATES else CHECKED_LENGTH
    # The linear family chooses its kernels by how many heads there are in all.
    batch = case.size.batch if case.op == "linear" else 2
    size = Size(batch, 1 if case.is_step else length, case.size.heads, case.size.dim)
    torch.manual_seed(0)
    given = case.draw(size, device, dtype)
    exact = tuple(None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in given)
    expected = results(case, case.reference, exact, gradients)
    actual = results(case, operation, given, gradients)
    for name, value in expected.items():
        error, scale = (x.double().square().mean().sqrt().item() for x in (actual[name] - value, value))
        # Written so that NaN is wrong.
        if not error <= BOUNDS[dtype] * max(scale, 1e-30):
            return f"{name} is off by {error:.2g} of {scale:.2g}, more than rounding in {dtype}"
    return None


def results(case: Case, operation: Operation, inputs: Inputs, gradients: bool) -> dict[str, Tensor]:
    """The output with all gradients, or of a step with the state after it."""
    if case.is_step:
        state = inputs[-1]
        assert state is not None
        with torch.no_grad():
            o, after = outputs_of(operation, (*inputs[:-1], state.clone()))[:2]
        return {"output": o, "state": after}
    o = outputs_of(operation, inputs)[0]
    if not gradients:
        return {"output": o.detach()}
    leaves = {str(n): x for n, x in enumerate(inputs) if x is not None and x.requires_grad}
    weights = torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o).to(torch.bfloat16)
    found = torch.autograd.grad(o, list(leaves.values()), weights.to(o.dtype))
    named = {f"gradient of input {n}": g for n, g in zip(leaves, found, strict=True)}
    return {"output": o.detach(), **named}


def call(operation: Operation, phase: Phase, inputs: Inputs, output: Tensor) -> Callable[[], object]:
    """One call on one copy of the inputs. `output` is what the output's gradient is taken to be."""
    leaves = [x for x in inputs if x is not None and x.requires_grad]

    def without_gradients() -> object:
        with torch.no_grad():
            return operation(*inputs)

    def with_gradients() -> object:
        return torch.autograd.grad(outputs_of(operation, inputs)[0], leaves, output)

    return with_gradients if phase == "both" else without_gradients


class Gpu:
    """The device at hand: its clock, its graphs and its bandwidth. Only `kernels.py` makes one."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        # One for all graphs: no two run at a time, and nothing that one leaves is read.
        self._pool = torch.cuda.graph_pool_handle()

    def span_ms(self, work: Callable[[], object]) -> float:
        """Milliseconds between events before and behind."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def warm(self, work: Callable[[], object]) -> None:
        """Beside the main stream, as a capture wants it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """A replay of `work`. Raises what torch raises where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                work()
        except Exception:
            # What is left of a capture that failed must not be met by the next.
            self._pool = torch.cuda.graph_pool_handle()
            raise
        return graph.replay

    def copy_gb_s(self) -> float:
        """Bytes read and written a second, in 1e9, of a copy that is far beyond the L2."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.warm(lambda: target.copy_(source))
        took = [self.span_ms(lambda: target.copy_(source)) for _ in range(20)]
        return 2 * source.numel() / statistics.median(took) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One form of a case in one phase, ready to be timed."""

    bytes: int
    """Of the memory floor."""
    spans: Mapping[str, Callable[[], float]]
    """By mode, `eager` and where it can be `captured`: milliseconds of one call."""
    not_captured: str | None


def prepare(gpu: Any, case: Case, phase: Phase, operation: Operation, drawn: Sequence[Inputs]) -> Prepared:
    """Raises what the operation raises."""
    with torch.no_grad():
        output = torch.randn_like(outputs_of(operation, drawn[0])[0])
    works = [call(operation, phase, inputs, output) for inputs in drawn]
    gpu.warm(works[0])
    one_ms = gpu.span_ms(partial(take_turns, works, len(works))) / len(works)
    number = calls(len(works), one_ms)
    all_calls = partial(take_turns, works, number)
    spans = {"eager": lambda: gpu.span_ms(all_calls) / number}
    not_captured = None
    try:
        replay = gpu.capture(all_calls)
        gpu.warm(replay)
        spans["captured"] = lambda: gpu.span_ms(replay) / number
    except Exception as error:
        not_captured = first_line(error)
    leaves = [x for x in drawn[0] if x is not None and x.requires_grad]
    state = size_of(drawn[0][-1:]) if phase == "step" else 0
    floor = floor_bytes(phase, size_of(drawn[0]), size_of(leaves), size_of([output]), state)
    return Prepared(bytes=floor, spans=spans, not_captured=not_captured)


def take_turns(works: Sequence[Callable[[], object]], number: int) -> None:
    for turn in range(number):
        works[turn % len(works)]()


def first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'no reason given'}"
