"""What an exception says of a trial: which outcome, and a reason in a sentence."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mixforge.evaluator.deadline import TimedOut
from mixforge.evaluator.evaluation import Outcome
from mixforge.kernels.backend import BeyondKernels

# torch's CPU allocator, oneDNN and CUDA's libraries raise a plain RuntimeError, which its text alone tells
# apart.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "could not create a memory")
_COMPILERS = ("torch._dynamo", "torch._inductor", "triton")
_LONGEST_REASON = 500


class Illegal(Exception):
    """The architecture is none, or none that the backend can run; the message says why."""


class Diverged(Exception):
    """Training left the numbers, or stayed above where it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a piece of work ended that did not end well."""

    outcome: Outcome
    reason: str
    trace: str | None
    """The traceback; None for an illegal architecture, where it would say nothing."""


def attempt(work: Callable[[], object]) -> Failure | None:
    """Do a trial's work; whatever it raises, but for a request to stop, is how the trial ended."""
    try:
        work()
    # The one broad except of the project: a candidate may fail in ways that nobody foresaw, and is recorded.
    except Exception as error:
        outcome, reason = outcome_of(error)
        trace = None if outcome is Outcome.illegal else traceback.format_exc()
        return Failure(outcome=outcome, reason=reason[:_LONGEST_REASON], trace=trace)
    return None


def outcome_of(error: Exception) -> tuple[Outcome, str]:
    """The outcome that an exception means, and a reason in one line."""
    named = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    match error:
        case Illegal() | BeyondKernels():
            return Outcome.illegal, str(error)
        case Diverged():
            return Outcome.diverged, str(error)
        case TimedOut():
            return Outcome.timed_out, str(error)
        case MemoryError() | torch.OutOfMemoryError():
            return Outcome.out_of_memory, named
        case RuntimeError() if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            return Outcome.out_of_memory, named
    # A compiler's own error classes say so by where they are defined; those they wrap come with them.
    if any(kind.__module__.startswith(_COMPILERS) for kind in type(error).__mro__):
        return Outcome.failed_to_compile, named
    return Outcome.crashed, named
