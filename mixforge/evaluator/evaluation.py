"""What is known of one architecture after it was trained and timed: the values that cross every border.

This module loads no torch: the database, the report and the command line read it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Phase = Literal["prefill", "decode", "train"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "train")


class Outcome(StrEnum):
    """How a trial ended. Everything but `ok` is stored with a reason and stops no campaign."""

    ok = "ok"
    illegal = "illegal"
    out_of_memory = "out_of_memory"
    diverged = "diverged"
    timed_out = "timed_out"
    failed_to_compile = "failed_to_compile"
    crashed = "crashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One of the quantities that campaigns steer by, queries filter on and reports draw."""

    name: str
    label: str
    unit: str
    better: Literal["lower", "higher"]


# The columns that people search by. A task that measures something new adds its figure here.
FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure(name="bits_per_byte", label="bits per byte", unit="bit/byte", better="lower"),
        Figure(name="recall", label="recall accuracy", unit="fraction", better="higher"),
        Figure(name="copying", label="copying accuracy", unit="fraction", better="higher"),
        Figure(name="tracking", label="state-tracking accuracy", unit="fraction", better="higher"),
        Figure(name="selectivity", label="hidden-state accuracy", unit="fraction", better="higher"),
        Figure(name="prefill_ms", label="prefill latency", unit="ms", better="lower"),
        Figure(name="decode_ms", label="decode latency per token", unit="ms", better="lower"),
        Figure(name="train_ms", label="train-step latency", unit="ms", better="lower"),
        Figure(name="peak_bytes", label="peak memory", unit="byte", better="lower"),
        Figure(name="params", label="parameters", unit="weights", better="lower"),
        Figure(name="flops", label="forward FLOPs", unit="FLOP", better="lower"),
        Figure(name="state_bytes", label="state and cache", unit="byte", better="lower"),
        Figure(name="decode_bytes", label="bytes moved per decoded token", unit="byte", better="lower"),
    )
}

# The figures that a task yields. Each has a second one, `_test`, of the test split.
SCORES = ("bits_per_byte", "recall", "copying", "tracking", "selectivity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where a figure was measured. Two figures are comparable when their environments are equal."""

    device: str
    """The device's own name: `NVIDIA H200`, or the CPU's model name."""
    device_kind: Literal["cpu", "cuda"]
    device_count: int
    """CPU cores, or CUDA devices, that were visible."""
    driver: str | None
    """CUDA driver version; None on a CPU."""
    clock_mhz: float | None
    threads: int
    """Threads that torch used."""
    python: str
    torch: str
    triton: str | None
    mixforge: str
    commit: str | None
    """Git commit of the package's checkout, with `+dirty` where it had changes; None when installed."""
    host: str
    """A hash of the host name."""
    system: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The training loss of one task."""

    task: str
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    """Nats per predicted token, at those steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One architecture under one budget: its costs, its scores and how the training went.

    Scores without a suffix are of the selection split, which the search sees; `_test` ones are of the test
    split. A score is None where its task was not in the budget or the outcome is not ok.
    """

    outcome: Outcome
    reason: str | None = None
    """A sentence, where the outcome is not ok."""
    trace: str | None = None
    """The traceback, where there was one."""
    context: int
    """Tokens of context at which flops, state_bytes and decode_bytes are stated."""
    params: int
    flops: int
    state_bytes: int
    decode_bytes: int
    bits_per_byte: float | None = None
    bits_per_byte_test: float | None = None
    recall: float | None = None
    recall_test: float | None = None
    copying: float | None = None
    copying_test: float | None = None
    tracking: float | None = None
    tracking_test: float | None = None
    selectivity: float | None = None
    selectivity_test: float | None = None
    train_tokens: int = 0
    train_s: float = 0.0
    curves: tuple[Curve, ...] = ()
    backend: str
    seed: int
    environment: Environment
    weights: str | None = None
    """File name of the kept safetensors weights (trained on the text task), where they were kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a latency is measured on.

    Prefill reads `context` tokens; decode adds one token after `context`.
    """

    batch: int = 1
    context: int = 512
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= 65536:
            raise ValueError(f"workload batch {self.batch} is not between 1 and 65536")
        if not 1 <= self.context <= 16_777_216:
            raise ValueError(f"workload context {self.context} is not between 1 and 16777216 tokens")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"workload dtype {self.dtype!r} is not one of float32, bfloat16, float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Repeats of one phase of one workload, all of them kept."""

    phase: Phase
    raw_ms: tuple[float, ...]
    """One latency per repeat, in the order they were taken: per prompt, per decoded token, per train step."""
    captured: bool = False
    """Whether the repeats were replays of a captured CUDA graph."""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.raw_ms)

    @property
    def spread_ms(self) -> float:
        """Interquartile range; 0 for a single repeat."""
        if len(self.raw_ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.raw_ms, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured latency and memory of one architecture on one device under one workload."""

    outcome: Outcome
    reason: str | None = None
    trace: str | None = None
    workload: Workload
    timings: tuple[Timing, ...] = ()
    peak_bytes: int | None = None
    """Highest memory of a train step above what the process held before the model was built."""
    backend: str
    environment: Environment

    def timing(self, phase: Phase) -> Timing | None:
        return next((timing for timing in self.timings if timing.phase == phase), None)
