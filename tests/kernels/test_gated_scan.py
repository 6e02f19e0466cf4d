"""The elementwise scan against a float64 loop, with every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixforge.kernels import gated_scan
from mixforge.kernels.gated_scan import FORMS, gated_scan_step


def draw(length: int, dtype: torch.dtype = torch.float64, batch: int = 2, width: int = 5) -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    log_a = -3 * torch.rand(batch, length, width, generator=dice, dtype=torch.float64)
    b = torch.randn(batch, length, width, generator=dice, dtype=torch.float64)
    state = torch.randn(batch, width, generator=dice, dtype=torch.float64)
    return [x.to(dtype) for x in (log_a, b, state)]


def oracle(log_a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    rows = []
    for t in range(b.shape[1]):
        state = torch.exp(log_a[:, t]) * state + b[:, t]
        rows.append(state)
    return torch.stack(rows, 1), state


def results(operation: object, inputs: list[Tensor]) -> list[Tensor]:
    assert callable(operation)
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, final = operation(*leaves)
    dice = torch.Generator().manual_seed(1)
    loss = (h * torch.randn(h.shape, generator=dice, dtype=torch.float64)).sum()
    loss = loss + (final * torch.randn(final.shape, generator=dice, dtype=torch.float64)).sum()
    return [h.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("blocks", [1, 2048])
@pytest.mark.parametrize("length", [1, 13, 63, 64, 65, 200])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_recurrence(
    length: int, backend: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_scan, "BLOCK_VALUES", blocks)
    inputs = draw(length)
    for actual, expected in zip(results(FORMS[backend], inputs), results(oracle, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 2048])
def test_gates_near_zero_and_near_one(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of gates is formed and never a quotient, so that a gate of nothing is exact."""
    monkeypatch.setattr(gated_scan, "BLOCK_VALUES", blocks)
    inputs = draw(150, torch.float32)
    inputs[0][:, ::9], inputs[0][:, 3::9], inputs[0][:, 40:60] = -1000.0, 0.0, -1e-7
    expected = results(oracle, [x.double() for x in inputs])
    for actual, wanted in zip(results(FORMS["torch"], inputs), expected, strict=True):
        assert (actual.double() - wanted).norm() <= 1e-6 * wanted.norm() + 1e-20


@pytest.mark.parametrize("length", [3, 50])
def test_gradcheck(length: int) -> None:
    leaves = [x.requires_grad_() for x in draw(length, batch=1, width=2)]
    assert torch.autograd.gradcheck(FORMS["torch"], leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_state_carries_a_sequence_across_pieces(backend: str) -> None:
    log_a, b, first = draw(90)
    expected, final = FORMS[backend](log_a, b, first)
    head, state = FORMS[backend](log_a[:, :41], b[:, :41], first)
    tail, state = FORMS[backend](log_a[:, 41:], b[:, 41:], state)
    torch.testing.assert_close(torch.cat([head, tail], 1), expected)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("grad", [False, True])
def test_steps_equal_the_scan(grad: bool) -> None:
    log_a, b, state = draw(10)
    expected, final = oracle(log_a, b, state)
    with torch.set_grad_enabled(grad):
        for t in range(10):
            given, before = state, state.clone()
            h, state = gated_scan_step(log_a[:, t], b[:, t], given)
            torch.testing.assert_close(h, expected[:, t])
            assert (state is given) is not grad
            assert not grad or torch.equal(given, before)
    torch.testing.assert_close(state, final)


def test_bfloat16_keeps_its_state_in_float32() -> None:
    inputs = draw(20, torch.bfloat16)
    for operation in FORMS.values():
        h, state = operation(*inputs)
        assert (h.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_no_state_is_a_state_of_zeros() -> None:
    log_a, b, state = draw(33)
    for operation in FORMS.values():
        torch.testing.assert_close(operation(log_a, b), operation(log_a, b, torch.zeros_like(state)))


def test_a_log_gate_is_above_zero_by_rounding_alone() -> None:
    """As that of RWKV-4 is, a difference of running maxima that grow with the time."""
    log_a, b, state = draw(33, torch.float32)
    level = torch.linspace(0, 60_000, 34)[None, :, None].expand(1, 34, 5)
    log_a = torch.cat([level[:, :-1] + torch.tensor(60_000 / 33) - level[:, 1:], log_a[:1]])
    assert 0 < log_a.max() < 0.01
    for operation in FORMS.values():
        operation(log_a, b, state)
        with pytest.raises(ValueError, match=r"log_a must be at most 0, got 0\.02; give log\(decay\)"):
            operation(log_a.clone().fill_(0.02), b, state)


def test_inputs_need_not_be_contiguous() -> None:
    log_a, b, state = draw(64)
    expected = results(oracle, [log_a, b, state])
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (log_a, b, state)]
    for actual, wanted in zip(results(FORMS["torch"], strided), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


# Dynamo makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("length", "backend"), [(9, "eager"), (34, "aot_eager")])
def test_compiles_as_one_graph(length: int, backend: str) -> None:
    """Forward and backward, in one block and in two."""
    torch._dynamo.reset()
    compiled = torch.compile(FORMS["torch"], fullgraph=True, backend=backend)
    inputs = draw(length)
    for actual, wanted in zip(results(compiled, inputs), results(FORMS["torch"], inputs), strict=True):
        torch.testing.assert_close(actual, wanted)
