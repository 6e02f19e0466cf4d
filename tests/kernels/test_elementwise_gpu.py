"""Scans, cells, convolution and norms on a GPU: errors against float64 at most twice those of the torch form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tolerance import assert_as_good, assert_close
from torch import Tensor

from mixforge.kernels import gated_scan, gated_scan_complex, norm, recurrent_cells, selective_scan, short_conv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 63, 200, 3000]
BACKENDS = ("triton", "torch", "reference")
# Where sequences of 1, 2, 60, 937 and 2000 tokens begin and end.
PACKED = torch.tensor([0, 1, 3, 63, 1000, 3000])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(
    forms: list[Callable[..., Tensor | tuple[Tensor, ...]]], inputs: list[Tensor | None], dtype: torch.dtype
) -> None:
    assert_as_good(*forms, [None if x is None else x.to("cuda", dtype) for x in inputs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_gated_scan(length: int, dtype: torch.dtype) -> None:
    inputs = [-torch.rand(3, length, 70), normal(3, length, 70), normal(3, 70)]
    check([gated_scan.form(name) for name in BACKENDS], inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_state", [False, True])
def test_packed_gated_scan(has_state: bool, dtype: torch.dtype) -> None:
    def run(name: str, *given: Tensor) -> tuple[Tensor, Tensor]:
        return gated_scan.form(name)(*given, *([] if has_state else [None]), PACKED.to(given[0].device))

    inputs = [-torch.rand(1, 3000, 70), normal(1, 3000, 70), *([normal(5, 70)] if has_state else [])]
    check([partial(run, name) for name in BACKENDS], inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_state", [False, True])
def test_packed_gated_scan_complex(has_state: bool, dtype: torch.dtype) -> None:
    def run(name: str, *given: Tensor) -> tuple[Tensor, Tensor]:
        return gated_scan_complex.form(name)(
            *given, *([] if has_state else [None]), PACKED.to(given[0].device)
        )

    inputs = [-torch.rand(1, 3000, 70), normal(1, 3000, 70), normal(1, 3000, 2, 70)]
    check(
        [partial(run, name) for name in BACKENDS],
        [*inputs, *([normal(5, 2, 70)] if has_state else [])],
        dtype,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_sequences_without_a_token(backend: str) -> None:
    """The state behind one is the state before it; where the others begin and end, it does not matter."""
    bounds, full = torch.tensor([0, 0, 3, 3, 3, 7, 7], device="cuda"), torch.tensor([1, 4], device="cuda")
    log_a, b, state = -torch.rand(1, 7, 70).cuda(), normal(1, 7, 70).cuda(), normal(6, 70).cuda()
    h, last = gated_scan.form(backend)(log_a, b, state, bounds)
    expected, after = gated_scan.form("reference")(
        log_a, b, state[full], torch.tensor([0, 3, 7], device="cuda")
    )
    assert_close("h", h, expected)
    assert_close("last states", last, state.index_copy(0, full, after))
    weight, past = normal(70, 4).cuda(), normal(6, 70, 3).cuda()
    y, last = short_conv.form(backend)(b, weight, None, "none", past, bounds)
    expected, after = short_conv.form("reference")(
        b, weight, None, "none", past[full], torch.tensor([0, 3, 7], device="cuda")
    )
    assert_close("y", y, expected)
    assert_close("last states", last, past.index_copy(0, full, after))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_gated_scan_complex(length: int, dtype: torch.dtype) -> None:
    inputs = [-torch.rand(3, length, 70), normal(3, length, 70), normal(3, length, 2, 70), normal(3, 2, 70)]
    check([gated_scan_complex.form(name) for name in BACKENDS], inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan(length: int, dtype: torch.dtype) -> None:
    inputs = [
        normal(3, length, 20), torch.rand(3, length, 20), -8 * torch.rand(20, 16), normal(3, length, 16),
        normal(3, length, 16), normal(20), normal(3, 20, 16),
    ]  # fmt: skip
    check([selective_scan.form(name) for name in BACKENDS], inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [2, 4, 8])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_short_conv(activation: str, taps: int, dtype: torch.dtype) -> None:
    def run(name: str, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return short_conv.form(name)(x, weight, bias, activation, state)

    inputs = [normal(3, 700, 70), normal(70, taps), normal(70), normal(3, 70, taps - 1)]
    check([partial(run, name) for name in BACKENDS], inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [2, 4, 8])
@pytest.mark.parametrize("has_state", [False, True])
def test_packed_short_conv(has_state: bool, taps: int, dtype: torch.dtype) -> None:
    def run(name: str, x: Tensor, weight: Tensor, bias: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        bounds = PACKED.to(x.device)
        return short_conv.form(name)(x, weight, bias, "silu", *(state or [None]), bounds)

    inputs = [
        normal(1, 3000, 70),
        normal(70, taps),
        normal(70),
        *([normal(5, 70, taps - 1)] if has_state else []),
    ]
    check([partial(run, name) for name in BACKENDS], inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [20, 1000, 5000])
def test_norms(width: int, dtype: torch.dtype) -> None:
    x, gate, weight = normal(7, 33, width), normal(7, 33, width), normal(width)
    check([norm.form(name) for name in BACKENDS], [x, weight], dtype)
    for first in (True, False):
        forms = [partial(norm.gated_form(name), norm_before_gate=first) for name in BACKENDS]
        check(forms, [x, gate, weight], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
# Of matrices that are held, and that are not.
@pytest.mark.parametrize("dim", [20, 64, 128, 300])
@pytest.mark.parametrize("length", [1, 63, 200])
@pytest.mark.parametrize("cell", recurrent_cells.CELLS)
def test_recurrent_cells(cell: str, length: int, dim: int, dtype: torch.dtype) -> None:
    about = recurrent_cells.CELLS[cell]
    bias = normal(3, dim) if about.has_bias else None
    matrices, state = normal(3, dim, about.gates * dim) / dim**0.5, normal(21, len(about.first), 3, dim)
    inputs = [normal(21, length, 3, about.gates * dim), matrices, bias, state.abs() + 0.1]
    check([recurrent_cells.form(name, cell) for name in BACKENDS], inputs, dtype)


@torch.no_grad()
@pytest.mark.parametrize("dim", [64, 300])
@pytest.mark.parametrize("cell", recurrent_cells.CELLS)
def test_steps_of_recurrent_cells(cell: str, dim: int) -> None:
    about = recurrent_cells.CELLS[cell]
    bias = normal(3, dim).cuda() if about.has_bias else None
    gates, state = normal(21, 5, 3, about.gates * dim).cuda(), normal(21, len(about.first), 3, dim).cuda()
    state = state.abs() + 0.1
    matrices = (normal(3, dim, about.gates * dim) / dim**0.5).cuda()
    expected, last = recurrent_cells.form("reference", cell)(gates, matrices, bias, state)
    for t in range(5):
        h, state = recurrent_cells.step_form("triton", cell)(gates[:, t], matrices, bias, state)
        assert_close("h", h, expected[:, t], 1e-5)
    assert_close("last states", state, last, 1e-5)
