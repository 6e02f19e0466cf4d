"""What Python takes of a call, of our kernels and of fla-core's: launches do nothing, and no GPU is needed.

    .venv-oracle/bin/python benchmarks/overhead.py [--json FILE] [--only PATTERN]

Tensors are small and on the CPU. What is left of a call is checks, choices, memory, autograd and torch's dispatch: what a
call of a small size waits for on a GPU, beside Triton's own part of each launch, which is left out of both. Forms of one
case take turns; a figure is the least of the turns' means. Under Triton's interpreter the exit status is 2; without
fla-core only ours are timed.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from on_gpu.cases import Case, Size, sequences, steps
from on_gpu.measuring import outputs_of
from traffic import GENERATION, asked_for, is_timed, written_down
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from mixforge.evaluator.environment import environment
from mixforge.kernels.launch import interpreting

SIZE = Size(1, 64, 2, 32)
CALLS, TURNS = 100, 15
# Triton's own, which `written_down` puts another in place of.
TUNE = Autotuner.run


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Microseconds of one form of one case."""

    op: str
    variant: str
    form: str
    forward_us: float
    """Without gradients."""
    both_us: float | None
    """Forward and backward; None of a step."""


@contextmanager
def launching_nothing() -> Generator[None]:
    """Let kernels be launched for CPU tensors as if those were on a GPU, and do nothing."""

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """In place of Triton's launch."""

    said: dict[str, Callable[..., object]] = {
        "check_runs": lambda name, tensor: None,
        "generation": lambda: GENERATION,
        "is_at_hand": lambda given: False,
    }
    with ExitStack() as stack:
        stack.enter_context(written_down())
        stack.enter_context(patch.object(JITFunction, "run", run))
        stack.enter_context(patch.object(Autotuner, "run", TUNE))
        stack.enter_context(patch.object(Autotuner, "_bench", lambda *args, **kwargs: [1.0, 1.0, 1.0]))
        for module in [each for name, each in sys.modules.items() if name.startswith("mixforge.kernels")]:
            for name, answer in said.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, answer))
        yield


def call(case: Case, form: str, has_gradients: bool) -> Callable[[], object]:
    """One call of a form."""
    inputs = case.draw(case.size, torch.device("cpu"), torch.bfloat16)
    operation = case.forms[form]
    leaves = [x for x in inputs if x is not None and x.requires_grad]

    def without() -> None:
        with torch.no_grad():
            operation(*inputs)

    def both() -> None:
        output = outputs_of(operation, inputs)[0]
        torch.autograd.grad(output, leaves, output.detach())

    return both if has_gradients else without


def least_us(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of each, in turns."""
    best = [float("inf")] * len(calls)
    for one in calls:
        for _ in range(CALLS // 5):
            one()
    for _ in range(TURNS):
        for number, one in enumerate(calls):
            start = time.perf_counter()
            for _ in range(CALLS):
                one()
            best[number] = min(best[number], (time.perf_counter() - start) / CALLS * 1e6)
    return best


def measure(case: Case) -> list[Row]:
    forms = [form for form in case.forms if is_timed(form)]
    phases = (False,) if case.is_step else (False, True)
    found = least_us([call(case, form, phase) for phase in phases for form in forms])
    forward, both = found[: len(forms)], found[len(forms) :] or [None] * len(forms)
    return [
        Row(op=case.op, variant=case.variant, form=form, forward_us=without, both_us=with_backward)
        for form, without, with_backward in zip(forms, forward, both, strict=True)
    ]


def main() -> int:
    asked = asked_for(__doc__)
    if interpreting():
        print("benchmarks/overhead.py times no interpreter: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    # Attention is PyTorch's in every form.
    every = [case for case in [*sequences(SIZE), *steps(SIZE)] if case.op != "attention"]
    chosen = [case for case in every if re.search(asked.only, case.label)]
    if not chosen:
        print(f"no case is found by {asked.only!r}", file=sys.stderr)
        return 2
    print(f"{'operation':<28}{'form':<36}{'forward us':>12}{'both us':>10}")
    rows = []
    with launching_nothing():
        for case in chosen:
            for row in measure(case):
                rows.append(row)
                both = "" if row.both_us is None else f"{row.both_us:10.0f}"
                print(
                    f"{row.op + ' ' + row.variant:<28}{row.form:<36}{row.forward_us:12.0f}{both}", flush=True
                )
    if asked.json is not None:
        made = {
            "command": " ".join(["python", *sys.argv]),
            "environment": asdict(environment("cpu")),
            "rows": [asdict(row) for row in rows],
        }
        asked.json.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
