"""The selective scan's torch form and step against the float64 loop, and a plain loop of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_agree
from torch import Tensor

from mixforge.kernels import selective_scan
from mixforge.kernels.selective_scan import FORMS, selective_scan_step


def draw(length: int) -> list[Tensor]:
    dice = torch.Generator().manual_seed(length)
    shapes = ((2, length, 5), (2, length, 5), (5, 3), (2, length, 3), (2, length, 3), (5,), (2, 5, 3))
    x, dt, rate, *rest = (torch.randn(*shape, generator=dice, dtype=torch.float64) for shape in shapes)
    return [x, dt.abs(), -rate.abs(), *rest]


def test_reference_equals_the_paper() -> None:
    x, dt, rate, b, c, skip, state = draw(7)
    y, final = FORMS["reference"](x, dt, rate, b, c, skip, state)
    for i, d in ((0, 0), (1, 4)):
        h = state[i, d].tolist()
        for t in range(7):
            step, value = float(dt[i, t, d]), float(x[i, t, d])
            h = [
                math.exp(step * float(rate[d, n])) * h[n] + step * float(b[i, t, n]) * value for n in range(3)
            ]
            out = sum(float(c[i, t, n]) * h[n] for n in range(3)) + float(skip[d]) * value
            assert float(y[i, t, d]) == pytest.approx(out)
        assert final[i, d].tolist() == pytest.approx(h)


@pytest.mark.parametrize("values", [1, 1 << 18])
@pytest.mark.parametrize("length", [1, 13, 65])
def test_torch_form_equals_the_loop(length: int, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective_scan, "SLAB_VALUES", values)
    inputs = draw(length)
    assert_agree(FORMS["torch"], FORMS["reference"], inputs, 1e-12)
    assert_agree(FORMS["torch"], FORMS["reference"], [*inputs[:5], None, None], 1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_steps_equal_the_scan(grad: bool) -> None:
    x, dt, rate, b, c, skip, state = draw(6)
    expected, final = FORMS["reference"](x, dt, rate, b, c, skip, state)
    with torch.set_grad_enabled(grad):
        for t in range(6):
            given = state
            y, state = selective_scan_step(x[:, t], dt[:, t], rate, b[:, t], c[:, t], skip, given)
            torch.testing.assert_close(y, expected[:, t])
            assert (state is given) is not grad
    torch.testing.assert_close(state, final)


# Dynamo makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("values", "backend"), [(1 << 18, "eager"), (120, "aot_eager")])
def test_compiles_as_one_graph(values: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, in one slab and in three."""
    monkeypatch.setattr(selective_scan, "SLAB_VALUES", values)
    torch._dynamo.reset()
    compiled = torch.compile(FORMS["torch"], fullgraph=True, backend=backend)
    assert_agree(compiled, FORMS["torch"], draw(11), 1e-12)
