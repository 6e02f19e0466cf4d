"""The short convolution: the Triton form against the float64 sum over taps, with every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tolerance import assert_agree, assert_close
from torch import Tensor

from mixforge.kernels import operands, short_conv, short_conv_triton
from mixforge.kernels.launch import recording

PACKED = torch.tensor([0, 1, 3, 20, 41])


def draw(
    length: int, taps: int, *, batch: int = 2, width: int = 11, sequences: int | None = None
) -> list[Tensor]:
    dice = torch.Generator().manual_seed(length)
    shapes = ((batch, length, width), (width, taps), (width,), (sequences or batch, width, taps - 1))
    return [torch.randn(*shape, generator=dice) for shape in shapes]


def run(
    backend: str, activation: str, x: Tensor, w: Tensor, b: Tensor | None, s: Tensor | None, *packed: Tensor
):
    return short_conv.form(backend)(x, w, b, activation, s, *packed)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("length", "taps"), [(1, 2), (2, 8), (13, 4), (65, 3)])
def test_equals_the_sum_over_taps(
    length: int, taps: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_conv_triton, "ROWS_EACH", 32)
    inputs = draw(length, taps, batch=3 if length < 20 else 1)
    forms = [partial(run, backend, activation) for backend in ("triton", "reference")]
    assert_agree(*forms, inputs)
    assert_agree(*forms, [*inputs[:2], None, None])


@pytest.mark.parametrize(("taps", "width"), [(1, 3), (4, 1)])
def test_one_tap_and_one_channel(taps: int, width: int) -> None:
    def output(backend: str, *inputs: Tensor | None) -> Tensor:
        return run(backend, "none", *inputs)[0]

    forms = [partial(output, backend) for backend in ("triton", "reference")]
    assert_agree(*forms, [*draw(5, taps, width=width)[:3], None])


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_packed_sequences(activation: str) -> None:
    inputs = draw(41, 4, batch=1, width=3, sequences=4)
    forms = [partial(run, backend, activation) for backend in ("triton", "reference")]
    assert_agree(*forms, [*inputs, PACKED])
    assert_agree(*forms, [*inputs[:3], None, PACKED.int()])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("has_state", [False, True])
def test_sequences_without_a_token(has_state: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a GPU does not tell of: behind one is the state before it, with its gradient."""
    monkeypatch.setattr(operands, "check_packed", lambda *_: None)
    *inputs, state = draw(7, 4, batch=1, width=3, sequences=6)
    full = torch.tensor([1, 4])

    def expected(*given: Tensor) -> tuple[Tensor, Tensor]:
        before = given[3] if has_state else torch.zeros(6, 3, 3, dtype=torch.float64)
        y, after = run("reference", "silu", *given[:3], before[full], torch.tensor([0, 3, 7]))
        return y, before.index_copy(0, full, after)

    def found(*given: Tensor) -> tuple[Tensor, Tensor]:
        bounds = torch.tensor([0, 0, 3, 3, 3, 7, 7])
        return run(backend, "silu", *given[:3], given[3] if has_state else None, bounds)

    assert_agree(found, expected, [*inputs, state] if has_state else inputs)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_steps_equal_the_convolution_in_place(taps: int) -> None:
    x, weight, bias, state = draw(6, taps)
    expected, final = short_conv.FORMS["reference"](x, weight, bias, "silu", state)
    for t in range(6):
        y, after = short_conv_triton.short_conv_step_triton(x[:, t], weight, bias, "silu", state)
        assert after is state
        assert_close("y", y, expected[:, t])
    assert torch.equal(state, final)


@pytest.mark.parametrize("packed", [False, True])
def test_registered_with_torch(packed: bool) -> None:
    x, weight, bias, state = draw(41, 4, batch=1, width=3, sequences=4 if packed else 1)
    leaves = [value.requires_grad_() for value in (x, weight, bias, state)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (*leaves[:3], True, state, PACKED if packed else None)
    torch.library.opcheck(short_conv_triton._forward, args, test_utils=checks)
    step = (x[:, 0].detach(), weight.detach(), None, True, state[:1].detach())
    torch.library.opcheck(short_conv_triton._step, step, test_utils=checks)


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(short_conv_triton.short_conv_triton, fullgraph=True, backend="aot_eager")
    x, weight, bias, state = draw(5, 4)
    assert_agree(
        lambda x, w, b, s: compiled(x, w, b, "silu", s),
        partial(run, "reference", "silu"),
        [x, weight, bias, state],
    )


def test_meta_tensors_are_written_down() -> None:
    inputs = [x.to("meta").requires_grad_() for x in draw(64, 4)]
    with recording("sm_90") as recorded:
        y, after = run("triton", "silu", *inputs)
        (y.sum() + after.sum()).backward()
    assert [one.name for one in recorded.launches] == [
        "conv_forward", "conv_weight_gradient", "conv_input_gradient", "conv_state_gradient",
    ]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_refuses_what_does_not_fit(backend: str) -> None:
    x, weight, bias, state = draw(5, 4)
    for message, wrong in (
        ("length of 0", (x[:, :0], weight, bias, state)),
        (r"weight has shape \[3, 4\]; it must be \[11, taps\]", (x, weight[:3], bias, state)),
        ("must have 1 to 8", (x, torch.ones(11, 9), bias, None)),
        (r"bias has shape \[2\]; it must be \[11\]", (x, weight, bias[:2], state)),
        (r"state has shape .*; it must be \[2, 11, 3\]", (x, weight, bias, state[:1])),
    ):
        with pytest.raises(ValueError, match=message):
            run(backend, "silu", *wrong)
    with pytest.raises(ValueError, match="none or silu, got 'relu'"):
        run(backend, "relu", x, weight, bias, state)
    with pytest.raises(ValueError, match="rise from 0 to the length 5"):
        run(backend, "silu", x[:1], weight, bias, None, torch.tensor([0, 7]))
