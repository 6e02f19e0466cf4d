"""Kernels in bfloat16 and float16: errors against float64 are at most twice those of torch's form in the same dtype."""

from __future__ import annotations

from functools import partial

import interpreting
import pytest
import torch
from tolerance import assert_as_good, assert_steps_as_good
from torch import Tensor
from triton import language as tl

from mixforge.kernels import (
    dplr,
    gated_scan,
    gated_scan_complex,
    norm,
    recurrent_cells,
    selective_scan,
    short_conv,
    twofold_linear,
)
from mixforge.kernels.chunked_linear import chunked_linear_reference, chunked_linear_torch
from mixforge.kernels.chunked_linear_triton import chunked_linear_triton

DTYPES = (torch.bfloat16, torch.float16)
BACKENDS = ("triton", "torch", "reference")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear_inputs(
    decay: str, rule: str, length: int, dim: int, dtype: torch.dtype, values: int | None = None
) -> list[Tensor | None]:
    shape, values = (1, length, 2, dim), values or dim + 3
    g = {"none": None, "head": -uniform(2), "scalar": -uniform(*shape[:3]), "channel": -uniform(*shape)}
    k = torch.nn.functional.normalize(normal(*shape), dim=-1)
    given = [x.to(dtype) for x in (normal(*shape) * dim**-0.5, k, normal(*shape[:3], values))]
    beta = 2 * uniform(*shape[:3]) if rule == "delta" else None
    return [*given, g[decay], beta, normal(1, 2, dim, values)]


def test_the_interpreter_rounds_as_torch_does() -> None:
    wide = torch.cat([normal(4096), normal(64) * 1e-39, torch.tensor([0.0, -0.0, 1.00390625, 1.01171875])])
    wide = torch.cat([wide, torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])])
    bits = interpreting._converted(wide.numpy(), tl.float32, tl.bfloat16, None)
    found = torch.from_numpy(bits.view("int16")).view(torch.bfloat16)
    torch.testing.assert_close(found, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.from_numpy(interpreting._converted(bits, tl.bfloat16, tl.float32, None).view("float32"))
    torch.testing.assert_close(back, wide.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("length", "dim", "dtype"),
    [(70, 16, torch.bfloat16), (70, 16, torch.float16), (130, 40, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("decay", ["none", "head", "scalar", "channel"])
@pytest.mark.parametrize("rule", ["add", "delta"])
def test_linear(rule: str, decay: str, length: int, dim: int, dtype: torch.dtype) -> None:
    forms = (chunked_linear_triton, chunked_linear_torch, chunked_linear_reference)
    assert_as_good(*forms, linear_inputs(decay, rule, length, dim, dtype))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_linear_over_wide_keys(decay: str) -> None:
    """Under rule delta, past the keys whose state is held."""
    forms = (chunked_linear_triton, chunked_linear_torch, chunked_linear_reference)
    assert_as_good(*forms, linear_inputs(decay, "delta", 70, 272, torch.bfloat16, values=20))


@pytest.mark.parametrize(
    ("dtype", "has_decay", "length", "keys", "values"),
    [
        (torch.bfloat16, True, 20, 24, 40),
        (torch.float16, True, 20, 24, 40),
        (torch.float16, False, 20, 24, 40),
        (torch.bfloat16, True, 5, 200, 20),
    ],
    ids=str,
)
def test_dplr(dtype: torch.dtype, has_decay: bool, length: int, keys: int, values: int) -> None:
    cells = (1, length, 1)
    q, k, v = (normal(*cells, dim) for dim in (keys, keys, values))
    a = torch.nn.functional.normalize(normal(*cells, keys) + 0.5, dim=-1)
    removal = torch.stack([a, a * uniform(*cells, keys)], -2)
    decay = -2 * uniform(*cells, keys) if has_decay else None
    inputs = [x.to(dtype) for x in (q * keys**-0.5, k, v)]
    assert_as_good(*map(dplr.form, BACKENDS), [*inputs, decay, removal, normal(1, 1, keys, values)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twofold_linear(dtype: torch.dtype) -> None:
    cells, keys, values = (1, 20, 1), 24, 40
    inputs = [x.to(dtype) for x in (normal(*cells, keys), normal(*cells, keys), normal(*cells, values))]
    decays = [-2 * uniform(*cells, dim) for dim in (keys, values)]
    assert_as_good(*map(twofold_linear.form, BACKENDS), [*inputs, *decays, normal(1, 1, keys, values)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_scans(dtype: torch.dtype) -> None:
    inputs = [-uniform(1, 20, 5), normal(1, 20, 5), normal(1, 5)]
    assert_as_good(*map(gated_scan.form, BACKENDS), [x.to(dtype) for x in inputs])
    inputs[2:] = [normal(1, 20, 2, 5), normal(1, 2, 5)]
    assert_as_good(*map(gated_scan_complex.form, BACKENDS), [x.to(dtype) for x in inputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selective_scan(dtype: torch.dtype) -> None:
    inputs = [
        normal(1, 12, 3), uniform(1, 12, 3), -8 * uniform(3, 16), normal(1, 12, 16), normal(1, 12, 16), normal(3),
        normal(1, 3, 16),
    ]  # fmt: skip
    assert_as_good(*map(selective_scan.form, BACKENDS), [x.to(dtype) for x in inputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_short_conv(activation: str, dtype: torch.dtype) -> None:
    def run(name: str, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return short_conv.form(name)(x, weight, bias, activation, state)

    inputs = [normal(2, 40, 11), normal(11, 4), normal(11), normal(2, 11, 3)]
    assert_as_good(*(partial(run, name) for name in BACKENDS), [x.to(dtype) for x in inputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype) -> None:
    x, gate, weight = (x.to(dtype) for x in (normal(3, 5, 20), 2 * normal(3, 5, 20), normal(20)))
    assert_as_good(*map(norm.form, BACKENDS), [x, weight])
    for first in (True, False):
        forms = [partial(norm.gated_form(name), norm_before_gate=first) for name in BACKENDS]
        assert_as_good(*forms, [x, gate, weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", recurrent_cells.CELLS)
def test_recurrent_cells(cell: str, dtype: torch.dtype) -> None:
    about = recurrent_cells.CELLS[cell]
    width, states = about.gates * 16, len(about.first)
    bias = normal(2, 16) if about.has_bias else None
    inputs = [normal(3, 12, 2, width), normal(2, 16, width) / 4, bias, normal(3, states, 2, 16).abs() + 0.1]
    forms = [recurrent_cells.form(name, cell) for name in BACKENDS]
    assert_as_good(*forms, [None if x is None else x.to(dtype) for x in inputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixer", ["gdn", "kda", "mamba2(heads=4)", "gla", "retnet"])
def test_a_mixers_step_is_as_good_as_torchs(mixer: str, dtype: torch.dtype) -> None:
    assert_steps_as_good(f"lm({mixer} + swiglu, width=32)", dtype)
