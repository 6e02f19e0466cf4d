"""The scan with complex gates, and packed sequences: torch forms against the float64 loop and Python's complex."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from tolerance import assert_agree
from torch import Tensor

from mixforge.kernels import gated_scan, short_conv
from mixforge.kernels.gated_scan_complex import FORMS, gated_scan_complex_step

PACKED = torch.tensor([0, 1, 18, 40])


def draw(length: int, batch: int = 2, sequences: int | None = None) -> list[Tensor]:
    dice = torch.Generator().manual_seed(length)
    log_a = -torch.rand(batch, length, 3, generator=dice, dtype=torch.float64)
    log_a[:, ::7], log_a[:, 3::7] = -math.inf, 0.0
    shapes = ((batch, length, 3), (batch, length, 2, 3), (sequences or batch, 2, 3))
    return [log_a, *(torch.randn(*shape, generator=dice, dtype=torch.float64) for shape in shapes)]


def test_reference_equals_complex_numbers() -> None:
    log_a, phase, b, state = draw(9)
    h, final = FORMS["reference"](log_a, phase, b, state)
    value = complex(float(state[1, 0, 2]), float(state[1, 1, 2]))
    for t in range(9):
        gate = cmath.rect(math.exp(log_a[1, t, 2]), float(phase[1, t, 2]))
        value = gate * value + complex(float(b[1, t, 0, 2]), float(b[1, t, 1, 2]))
        assert complex(*h[1, t, :, 2].tolist()) == pytest.approx(value)
    assert complex(*final[1, :, 2].tolist()) == pytest.approx(value)


@pytest.mark.parametrize("length", [1, 13, 65, 200])
def test_torch_form_equals_the_loop(length: int) -> None:
    inputs = draw(length)
    assert_agree(FORMS["torch"], FORMS["reference"], inputs, 1e-12)
    assert_agree(FORMS["torch"], FORMS["reference"], [*inputs[:3], None], 1e-12)


def test_packed_sequences() -> None:
    log_a, phase, b, state = draw(40, 1, 3)
    assert_agree(FORMS["torch"], FORMS["reference"], [log_a, phase, b, state, PACKED], 1e-12)
    forms = gated_scan.FORMS
    assert_agree(forms["torch"], forms["reference"], [log_a, phase, state[:, 0], PACKED], 1e-12)
    expected = forms["reference"](log_a[:, 1:18], phase[:, 1:18], state[1:2, 0])
    h, final = forms["torch"](log_a, phase, state[:, 0], PACKED)
    torch.testing.assert_close((h[:, 1:18], final[1:2]), expected)


def test_packed_convolution() -> None:
    _, x, _, state = draw(40, 1, 3)
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for run in short_conv.FORMS.values():
        y, after = run(x, weight, None, "silu", state.transpose(1, 2), PACKED)
        expected = run(x[:, 1:18], weight, None, "silu", state[1:2].transpose(1, 2))
        torch.testing.assert_close((y[:, 1:18], after[1:2]), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_steps_equal_the_scan(grad: bool) -> None:
    *inputs, state = draw(6)
    expected, final = FORMS["reference"](*inputs, state)
    with torch.set_grad_enabled(grad):
        for t in range(6):
            given = state
            h, state = gated_scan_complex_step(*(x[:, t] for x in inputs), given)
            torch.testing.assert_close(h, expected[:, t])
            assert (state is given) is not grad
    torch.testing.assert_close(state, final)


# Dynamo makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("length", "backend"), [(9, "eager"), (34, "aot_eager")])
def test_compiles_as_one_graph(length: int, backend: str) -> None:
    """Forward and backward, in one block and in two."""
    torch._dynamo.reset()
    compiled = torch.compile(FORMS["torch"], fullgraph=True, backend=backend)
    assert_agree(compiled, FORMS["torch"], draw(length), 1e-12)
