"""Latency and memory of one architecture on the device that is there.

Three phases are timed: prefill (a whole prompt into an empty state), decode (one token after a real
prefill) and a train step (forward, backward, AdamW). Inputs are random tokens, for products of zeros draw
less power and run faster. Each phase is warmed until it is stable; then the phases take turns, so that a
drift of the clock falls on all of them. Every repeat is kept. On CUDA, time is taken by events on the
device and decode is a captured graph, replayed; its weights and state are as warm in the L2 cache as
decoding one sequence leaves them.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mixforge.evaluator.candidate import token_loss
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluation import PHASES, Outcome, Phase, Profile, Timing, Workload
from mixforge.evaluator.memory import check_room, peak_bytes
from mixforge.evaluator.outcomes import Illegal, attempt
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.mixer import Backend
from mixforge.search_space.model import LanguageModel, State

_ROUNDS = 5
_MOST_REPEATS = 100
# Warm-up ends where this many windows in a row have medians this close, or where its time is over.
_WINDOWS = 3
_WINDOW = 3
_CLOSE = {"cpu": 0.05, "cuda": 0.01}


def profile(
    architecture: Architecture,
    workload: Workload,
    device: str = "cpu",
    backend: Backend = "torch",
    *,
    seconds: float = 0.3,
    deadline_s: float = 600.0,
) -> Profile:
    """Time an architecture with weights that were not trained. One outcome or another, it returns.

    seconds: roughly what each phase gets for its repeats (at least 5 repeats), and at most as much for its
    warm-up after three windows. On a CPU it uses as many threads as the process is set to. Raises
    ValueError where the device is not there.
    """
    where = environment(device)
    found = _Findings()
    deadline = Deadline(deadline_s)
    failure = attempt(lambda: _run(architecture, workload, device, backend, seconds, deadline, found))
    return Profile(
        outcome=Outcome.ok if failure is None else failure.outcome,
        reason=None if failure is None else failure.reason,
        trace=None if failure is None else failure.trace,
        workload=workload,
        timings=tuple(found.timings),
        peak_bytes=found.peak_bytes,
        backend=backend,
        environment=where,
    )


class _Findings:
    def __init__(self) -> None:
        self.timings: list[Timing] = []
        self.peak_bytes: int | None = None


def _run(
    architecture: Architecture,
    workload: Workload,
    device: str,
    backend: Backend,
    seconds: float,
    deadline: Deadline,
    found: _Findings,
) -> None:
    reason = architecture.why_illegal()
    if reason is not None:
        raise Illegal(reason)
    check_room(architecture.cost(1).params, device)
    dtype: torch.dtype = getattr(torch, workload.dtype)

    def build() -> LanguageModel:
        return architecture.build(backend, 0, device, dtype)

    found.peak_bytes = peak_bytes(lambda: _TrainStep(build(), workload).prepare()(), device)
    model = build()
    deadline.check("building the model")
    stations: dict[Phase, _Station] = {
        "prefill": _Prefill(model, workload),
        "decode": _decode(model, workload),
        "train": _TrainStep(model, workload),
    }
    with _undisturbed():
        repeats = {phase: _warm(station, device, seconds, deadline) for phase, station in stations.items()}
        raw: dict[Phase, list[float]] = {phase: [] for phase in PHASES}
        for _ in range(_ROUNDS):
            for phase, station in stations.items():
                deadline.check(f"timing {phase}")
                raw[phase] += [_time(station, device) for _ in range(repeats[phase])]
    found.timings = [
        Timing(phase=phase, raw_ms=tuple(raw[phase]), captured=isinstance(stations[phase], _CapturedDecode))
        for phase in PHASES
    ]


def _warm(station: _Station, device: str, seconds: float, deadline: Deadline) -> int:
    """Repeat until stable. Returns how many repeats of a round fill its share of `seconds`."""
    medians: list[float] = []
    started = time.monotonic()
    close = _CLOSE[torch.device(device).type]
    while True:
        deadline.check("warming up")
        medians.append(statistics.median(_time(station, device) for _ in range(_WINDOW)))
        last = medians[-_WINDOWS:]
        stable = len(last) == _WINDOWS and max(last) <= (1 + close) * min(last)
        if stable or time.monotonic() - started > seconds:
            break
    wanted = math.ceil(seconds * 1e3 / _ROUNDS / max(medians[-1], 1e-6))
    return max(1, min(_MOST_REPEATS // _ROUNDS, wanted))


def _time(station: _Station, device: str) -> float:
    """Milliseconds of one repeat, its preparation apart."""
    work = station.prepare()
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        end.synchronize()
        elapsed_ms: float = start.elapsed_time(end)
        return elapsed_ms
    started = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - started) / 1e6


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection while times are taken."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Prefill:
    """A prompt of `context` tokens into an empty state."""

    def __init__(self, model: LanguageModel, workload: Workload) -> None:
        self._model = model
        self._tokens_BT = _tokens(model, workload.batch, workload.context)

    def prepare(self) -> Callable[[], object]:
        return lambda: self._model.prefill(self._tokens_BT, capacity=self._tokens_BT.shape[1])


def _decode(model: LanguageModel, workload: Workload) -> _Decode | _CapturedDecode:
    _, state = model.prefill(_tokens(model, workload.batch, workload.context), capacity=workload.context + 1)
    token_B = _tokens(model, workload.batch, 1)[:, 0]
    return _CapturedDecode(model, token_B, state) if token_B.is_cuda else _Decode(model, token_B, state)


class _Decode:
    """One token after `context` tokens. Each repeat starts from the state that the prefill left."""

    def __init__(self, model: LanguageModel, token_B: Tensor, state: State) -> None:
        self._model = model
        self._token_B = token_B
        self._state = state

    def prepare(self) -> Callable[[], object]:
        state = _copy(self._state)
        return lambda: self._model.step(self._token_B, state)


class _CapturedDecode:
    """The same as a CUDA graph.

    A graph reads and writes fixed buffers, so they are filled anew before a replay. It holds none of them itself:
    what it reads is kept here, or the allocator would give its memory to others.
    """

    def __init__(self, model: LanguageModel, token_B: Tensor, state: State) -> None:
        self._reads = model, token_B
        self._state = state
        self._buffers = _copy(state)
        # Capture wants a stream of its own that has run the work before, so that nothing is allocated for the
        # first time inside it.
        stream = torch.cuda.Stream(token_B.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(token_B.device))
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                model.advance(token_B, self._buffers.position, self._buffers.layers)
        torch.cuda.current_stream(token_B.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph, stream=stream):
            # The results are kept, for the graph writes to their memory at every replay.
            self.result = model.advance(token_B, self._buffers.position, self._buffers.layers)

    def prepare(self) -> Callable[[], object]:
        for buffers, layer in zip(self._buffers.layers, self._state.layers, strict=True):
            for name, tensor in layer.items():
                buffers[name].copy_(tensor)
        self._buffers.position.copy_(self._state.position)
        return self._graph.replay


class _TrainStep:
    """Forward, backward and AdamW on `batch` sequences of `context` tokens, at a rate of 0."""

    def __init__(self, model: LanguageModel, workload: Workload) -> None:
        self._model = model
        self._tokens_BT = _tokens(model, workload.batch, workload.context)
        self._targets_N = _tokens(model, workload.batch, workload.context).flatten()
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def prepare(self) -> Callable[[], object]:
        return self._step

    def _step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        x_BTD = self._model.body(self._model.embed(self._tokens_BT))
        loss = token_loss(self._model, x_BTD.flatten(0, 1), self._targets_N)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


_Station = _Prefill | _Decode | _CapturedDecode | _TrainStep


def _copy(state: State) -> State:
    layers = [{name: tensor.clone() for name, tensor in layer.items()} for layer in state.layers]
    return State(state.length, state.capacity, state.position.clone(), layers)


def _tokens(model: LanguageModel, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.vocab, (batch, length), generator=generator)
    return tokens_BT.to(model.embedding.weight.device)
