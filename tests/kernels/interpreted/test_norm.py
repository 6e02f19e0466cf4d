"""The normalisation with and without a gate: the Triton form against float64, with every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tolerance import assert_agree
from torch import Tensor

from mixforge.kernels import norm, norm_triton
from mixforge.kernels.launch import recording

SHAPES = [(2, 1), (3, 5, 20), (37, 64)]


def draw(shape: tuple[int, ...]) -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=dice) for size in (shape, shape, shape[-1:])]


def gated(backend: str, activation: str, first: bool, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return norm.gated_form(backend)(x, gate, weight, 1e-5, activation, first)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("programs", [3, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_equation(
    backend: str, shape: tuple[int, ...], programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_triton, "PROGRAMS", programs)
    x, _, weight = draw(shape)
    # One value alone is normalised to its sign, whose gradient is all rounding: a large eps keeps some.
    eps = 1.0 if shape[-1] == 1 else 1e-5
    forms = [partial(norm.form(name), eps=eps) for name in (backend, "reference")]
    assert_agree(*forms, [x, weight])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_gated_equals_the_equation(
    backend: str, shape: tuple[int, ...], activation: str, first: bool
) -> None:
    forms = [partial(gated, name, activation, first) for name in (backend, "reference")]
    assert_agree(*forms, draw(shape))


def test_registered_with_torch() -> None:
    x, gate, weight = (value.requires_grad_() for value in draw((3, 5, 20)))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(norm_triton._forward, (x, gate, weight, 1e-5, True, False), test_utils=checks)
    torch.library.opcheck(norm_triton._forward, (x, None, weight, 1e-5, True, True), test_utils=checks)


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(norm_triton.rms_norm_gated_triton, fullgraph=True, backend="aot_eager")
    assert_agree(compiled, norm.rms_norm_gated_reference, draw((4, 20)))


def test_meta_tensors_are_written_down() -> None:
    x, gate, weight = (value.to("meta").requires_grad_() for value in draw((4, 20)))
    with recording("gfx942") as recorded:
        gated("triton", "sigmoid", False, x, gate, weight).sum().backward()
    assert [one.name for one in recorded.launches] == ["norm_forward", "norm_backward"]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_refuses_what_does_not_fit(backend: str) -> None:
    x, gate, weight = draw((3, 20))
    with pytest.raises(ValueError, match="has no values"):
        norm.form(backend)(x[:0], weight)
    with pytest.raises(ValueError, match=r"weight has shape \[3\]; it must be \[20\]"):
        norm.form(backend)(x, weight[:3])
    with pytest.raises(ValueError, match=r"gate has shape \[2, 20\]; it must be \[3, 20\]"):
        gated(backend, "silu", True, x, gate[:2], weight)
    with pytest.raises(ValueError, match="silu or sigmoid, got 'relu'"):
        gated(backend, "relu", True, x, gate, weight)


def test_triton_refuses_rows_that_no_program_holds() -> None:
    with pytest.raises(ValueError, match="at most 16384"):
        norm_triton.rms_norm_triton(torch.ones(1, 16385), torch.ones(16385))
