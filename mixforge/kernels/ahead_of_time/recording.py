"""Writing down what a case launches, forward and backward, and the bytes that its launches move.

A case runs on meta tensors, through the same operations and the same autograd as a training step. There a custom
operation would only make its outputs' shapes, so for the time of a recording its own function runs instead.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from mixforge.kernels.ahead_of_time.case import Case
from mixforge.kernels.launch import Launch, recording


@dataclass(frozen=True, slots=True)
class Pass:
    """What the forward or the backward pass of a case launches."""

    launches: tuple[Launch, ...]
    least_bytes: int
    """Of what must be read and written: inputs, outputs and, backward, their gradients, each once."""

    @property
    def traffic_bytes(self) -> int:
        return sum(launch.traffic_bytes for launch in self.launches)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Both passes of one case on one target. A case without gradients has no backward pass."""

    case: Case
    target: str
    forward: Pass
    backward: Pass | None


def record(case: Case, target: str) -> Recorded:
    """Run a case on meta tensors and write its launches down."""
    with recording(target) as made, _operations_run():
        function, args = case.call(case)
        inputs = _tensors(args)
        # A step without gradients brings its state up to date in place.
        with torch.set_grad_enabled(any(tensor.requires_grad for tensor in inputs)):
            outputs = function(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        forward = Pass(tuple(made.launches), _bytes([*inputs, *_tensors(outputs)]))
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        if not wanted:
            return Recorded(case, target, forward, None)
        gradient = torch.empty_like(outputs[0])
        gradients = torch.autograd.grad(outputs[0], wanted, gradient, allow_unused=True)
        launches = tuple(made.launches[len(forward.launches) :])
        backward = Pass(launches, _bytes([*inputs, gradient, *_tensors(gradients)]))
    return Recorded(case, target, forward, backward)


@contextmanager
def _operations_run() -> Generator[None]:
    """Let the package's custom operations run on meta tensors as they would on a device."""
    ours = [operation for name, operation in OPDEFS.items() if name.startswith("mixforge::")]
    fakes = [operation._abstract_fn for operation in ours]
    for operation in ours:
        operation.register_fake(operation._init_fn)
    try:
        yield
    finally:
        for operation, fake in zip(ours, fakes, strict=True):
            operation.register_fake(fake)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())
