"""Scans, convolution and norms on a GPU: errors against float64 at most twice those of the torch form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

from mixforge.kernels import gated_scan, gated_scan_complex, norm, selective_scan, short_conv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 63, 200, 3000]
BACKENDS = ("triton", "torch", "reference")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(
    forms: list[Callable[..., Tensor | tuple[Tensor, ...]]], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    assert_as_good(*forms, [x.to("cuda", dtype) for x in inputs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_gated_scan(length: int, dtype: torch.dtype) -> None:
    inputs = [-torch.rand(3, length, 70), normal(3, length, 70), normal(3, 70)]
    check([gated_scan.form(name) for name in BACKENDS], inputs, dtype)


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
@pytest.mark.parametrize("width", [20, 1000, 5000])
def test_norms(width: int, dtype: torch.dtype) -> None:
    x, gate, weight = normal(7, 33, width), normal(7, 33, width), normal(width)
    check([norm.form(name) for name in BACKENDS], [x, weight], dtype)
    for first in (True, False):
        forms = [partial(norm.gated_form(name), norm_before_gate=first) for name in BACKENDS]
        check(forms, [x, gate, weight], dtype)
