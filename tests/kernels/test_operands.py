"""What operations refuse, in every form: tensors elsewhere, of other dtypes, of other shapes, without values.

What is refused is refused before anything runs, so that nothing here needs a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mixforge.kernels import (
    diagonal_ssm,
    dplr,
    gated_scan,
    gated_scan_complex,
    norm,
    recurrent_cells,
    selective_scan,
    short_conv,
    softmax_scan,
    twofold_linear,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ["reference", "torch", *(["triton"] if HAS_TRITON else [])]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def negative(*shape: int) -> Tensor:
    return -normal(*shape).abs()


@dataclass(frozen=True)
class Operation:
    """`form` gives that of a backend, and `given` its arguments in their order."""

    form: Callable[[str], Callable[..., Any]]
    given: dict[str, Any]
    rows: tuple[str, ...] = ()
    """Arguments that begin with batch and, but of a step, time; the state is no such."""
    logs: tuple[str, ...] = ()
    """Arguments that must not be above zero."""
    is_step: bool = False

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.given.items() if isinstance(x, Tensor)}


def by_carry(form: Callable[[str], Callable[..., Any]], backend: str) -> Callable[..., Any]:
    return lambda z, v, *carry: form(backend)(z, v, carry)


OPERATIONS: dict[str, Operation] = {
    "norm": Operation(norm.form, {"x": normal(3, 5), "weight": normal(5)}),
    "gated norm": Operation(
        norm.gated_form, {"x": normal(3, 5), "gate": normal(3, 5), "weight": normal(5)}
    ),
    "gated scan": Operation(
        gated_scan.form,
        {"log_a": negative(2, 4, 3), "b": normal(2, 4, 3), "state": normal(2, 3)},
        rows=("log_a", "b"), logs=("log_a",),
    ),
    "gated step": Operation(
        gated_scan.step_form,
        {"log_a": negative(2, 3), "b": normal(2, 3), "state": normal(2, 3)},
        rows=("log_a", "b"), logs=("log_a",), is_step=True,
    ),
    "complex scan": Operation(
        gated_scan_complex.form,
        {"log_a": negative(2, 4, 3), "phase": normal(2, 4, 3), "b": normal(2, 4, 2, 3), "state": normal(2, 2, 3)},
        rows=("log_a", "phase", "b"), logs=("log_a",),
    ),
    "complex step": Operation(
        gated_scan_complex.step_form,
        {"log_a": negative(2, 3), "phase": normal(2, 3), "b": normal(2, 2, 3), "state": normal(2, 2, 3)},
        rows=("log_a", "phase", "b"), logs=("log_a",), is_step=True,
    ),
    "convolution": Operation(
        short_conv.form,
        {
            "x": normal(2, 4, 3), "weight": normal(3, 4), "bias": normal(3), "activation": "silu",
            "state": normal(2, 3, 3),
        },
        rows=("x",),
    ),
    "convolution's step": Operation(
        short_conv.step_form,
        {"x": normal(2, 3), "weight": normal(3, 4), "bias": normal(3), "activation": "silu", "state": normal(2, 3, 3)},
        rows=("x",), is_step=True,
    ),
    "selective scan": Operation(
        selective_scan.form,
        {
            "x": normal(2, 4, 3), "dt": normal(2, 4, 3).abs(), "rate": negative(3, 5), "b": normal(2, 4, 5),
            "c": normal(2, 4, 5), "skip": normal(3), "state": normal(2, 3, 5),
        },
        rows=("x", "dt", "b", "c"), logs=("rate",),
    ),
    "selective step": Operation(
        selective_scan.step_form,
        {
            "x": normal(2, 3), "dt": normal(2, 3).abs(), "rate": negative(3, 5), "b": normal(2, 5), "c": normal(2, 5),
            "skip": normal(3), "state": normal(2, 3, 5),
        },
        rows=("x", "dt", "b", "c"), logs=("rate",), is_step=True,
    ),
    "diagonal scan": Operation(
        diagonal_ssm.form,
        {
            "x": normal(2, 4, 3), "rate": negative(3, 5), "frequency": normal(3, 5), "c": normal(3, 5, 2),
            "state": normal(2, 3, 5, 2),
        },
        rows=("x",), logs=("rate",),
    ),
    "diagonal step": Operation(
        diagonal_ssm.step_form,
        {
            "x": normal(2, 3), "rate": negative(3, 5), "frequency": normal(3, 5), "c": normal(3, 5, 2),
            "state": normal(2, 3, 5, 2),
        },
        rows=("x",), logs=("rate",), is_step=True,
    ),
    **{
        cell: Operation(
            partial(recurrent_cells.form, cell=cell),
            {
                "gates": normal(2, 4, 3, about.gates * 5), "recurrent": normal(3, 5, about.gates * 5),
                "bias": normal(3, 5) if about.has_bias else None, "state": normal(2, len(about.first), 3, 5).abs(),
            },
            rows=("gates",),
        )
        for cell, about in recurrent_cells.CELLS.items()
    },
    **{
        f"{cell}'s step": Operation(
            partial(recurrent_cells.step_form, cell=cell),
            {
                "gates": normal(2, 3, about.gates * 5), "recurrent": normal(3, 5, about.gates * 5),
                "bias": normal(3, 5) if about.has_bias else None, "state": normal(2, len(about.first), 3, 5).abs(),
            },
            rows=("gates",), is_step=True,
        )
        for cell, about in recurrent_cells.CELLS.items()
    },
    "dplr": Operation(
        dplr.form,
        {
            "q": normal(2, 4, 3, 5), "k": normal(2, 4, 3, 5), "v": normal(2, 4, 3, 6), "decay": negative(2, 4, 3, 5),
            "removal": normal(2, 4, 3, 2, 5), "state": normal(2, 3, 5, 6),
        },
        rows=("q", "k", "v", "decay", "removal"), logs=("decay",),
    ),
    "dplr's step": Operation(
        dplr.step_form,
        {
            "q": normal(2, 3, 5), "k": normal(2, 3, 5), "v": normal(2, 3, 6), "decay": negative(2, 3, 5),
            "removal": normal(2, 3, 2, 5), "state": normal(2, 3, 5, 6),
        },
        rows=("q", "k", "v", "decay", "removal"), logs=("decay",), is_step=True,
    ),
    "twofold": Operation(
        twofold_linear.form,
        {
            "q": normal(2, 4, 3, 5), "k": normal(2, 4, 3, 5), "v": normal(2, 4, 3, 6), "decay": negative(2, 4, 3, 5),
            "value_decay": negative(2, 4, 3, 6), "state": normal(2, 3, 5, 6),
        },
        rows=("q", "k", "v", "decay", "value_decay"), logs=("decay", "value_decay"),
    ),
    "twofold's step": Operation(
        twofold_linear.step_form,
        {
            "q": normal(2, 3, 5), "k": normal(2, 3, 5), "v": normal(2, 3, 6), "decay": negative(2, 3, 5),
            "value_decay": negative(2, 3, 6), "state": normal(2, 3, 5, 6),
        },
        rows=("q", "k", "v", "decay", "value_decay"), logs=("decay", "value_decay"), is_step=True,
    ),
    "softmax scan": Operation(
        partial(by_carry, softmax_scan.form),
        {"z": normal(2, 3, 4), "v": normal(2, 3, 4, 5), "m": normal(2, 3), "u": normal(2, 3), "w": normal(2, 3, 5)},
    ),
    "softmax step": Operation(
        partial(by_carry, softmax_scan.step_form),
        {"z": normal(2, 3), "v": normal(2, 3, 5), "m": normal(2, 3), "u": normal(2, 3), "w": normal(2, 3, 5)},
    ),
}  # fmt: skip
EACH_TENSOR = [
    pytest.param(operation, name, id=f"{called}-{name}")
    for called, operation in OPERATIONS.items()
    for name in operation.tensors()
]


def refused(operation: Operation, backend: str, message: str, **others: Any) -> None:
    with pytest.raises(ValueError, match=message):
        operation.form(backend)(*(operation.given | others).values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "name"), EACH_TENSOR)
def test_a_tensor_that_is_elsewhere(operation: Operation, name: str, backend: str) -> None:
    refused(operation, backend, rf"\b{name} (is )?on meta\b", **{name: operation.given[name].to("meta")})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "name"), EACH_TENSOR)
def test_a_dtype_that_does_not_go_with_the_others(operation: Operation, name: str, backend: str) -> None:
    given = operation.given[name]
    refused(operation, backend, rf"\b{name} is torch.float64\b", **{name: given.double()})
    refused(operation, backend, f"{name} is torch.int64", **{name: given.long()})
    halves = {other: x.bfloat16() for other, x in operation.tensors().items()}
    refused(operation, backend, rf"\b{name} is torch.float16\b", **{**halves, name: given.half()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "name"), EACH_TENSOR)
def test_another_shape(operation: Operation, name: str, backend: str) -> None:
    refused(operation, backend, "has shape .*; .*it must be", **{name: operation.given[name][..., :-1]})
    # Rows that are normalised may lie on any axes.
    if operation.rows or name != "x":
        refused(operation, backend, "has shape .*; .*it must be", **{name: operation.given[name][None]})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_no_sequence_and_no_token(operation: Operation, backend: str) -> None:
    rows = {name: operation.given[name] for name in operation.rows}
    if "state" in operation.given:
        state = operation.given["state"][:0]
        none = {name: x[:0] for name, x in rows.items()}
        refused(operation, backend, "has a batch of 0 .* at least 1", **none, state=state)
    if rows and not operation.is_step:
        none = {name: x[:, :0] for name, x in rows.items()}
        refused(operation, backend, "has a length of 0 .* at least 1", **none)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_logs_above_zero(operation: Operation, backend: str) -> None:
    """Over a sequence; a step looks at no values."""
    for name in () if operation.is_step else operation.logs:
        wrong = operation.given[name].clone()
        wrong.view(-1)[-1] = 0.5
        refused(
            operation,
            backend,
            rf"{name} must (be at most 0, got|lie in \[-5, 0\], .* to) 0.5",
            **{name: wrong},
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_step_without_a_state(operation: Operation, backend: str) -> None:
    if operation.is_step:
        refused(operation, backend, r"state is None; it must be a tensor of shape \[", state=None)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_model_that_diverged_is_none_of_it(operation: Operation, backend: str) -> None:
    """NaN in place of logs; nor are float32 operands beside halves."""
    given = operation.given | {
        name: x * torch.nan for name, x in operation.tensors().items() if name in operation.logs
    }
    operation.form(backend)(*given.values())
    first = next(name for name in operation.tensors() if name in ("b", "v", "x", "gates"))
    halves = {name: x.bfloat16() for name, x in operation.tensors().items() if name in (first, "q", "k", "v")}
    out = operation.form(backend)(*(operation.given | halves).values())
    assert (out if isinstance(out, Tensor) else out[0]).dtype == torch.bfloat16
