"""Recurrent cells against their equations as float64 loops, with every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixforge.kernels.recurrent_cells import CELLS, EMPTY, form, step_form

BACKENDS = ["reference", "torch"]


def draw(
    cell: str,
    length: int,
    *,
    batch: int = 3,
    heads: int = 2,
    dim: int = 5,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    dice = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64).to(dtype)

    gates = CELLS[cell].gates * dim
    state = normal(batch, len(CELLS[cell].first), heads, dim)
    if cell == "slstm":
        state[:, 2] = state[:, 2].abs() + 0.1
    bias = normal(heads, dim) if cell == "gru" else None
    return [normal(batch, length, heads, gates), normal(heads, dim, gates) / dim**0.5, bias, state]


def oracle(cell: str, gates: Tensor, recurrent: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """h_BTHK by the equations; an sLSTM without its stabiliser, which float64 does not need at these sizes."""
    h, *others = state.unbind(1)
    if cell == "slstm":
        c, n = others[0] * others[2].exp(), others[1] * others[2].exp()
    rows = []
    for t in range(gates.shape[1]):
        given = gates[:, t].chunk(CELLS[cell].gates, -1)
        own = torch.einsum("bhk,hkf->bhf", h, recurrent).chunk(CELLS[cell].gates, -1)
        if cell == "gru":
            r, z = (1 / (1 + torch.exp(-given[gate] - own[gate])) for gate in range(2))
            h = (1 - z) * torch.tanh(given[2] + r * (own[2] + bias)) + z * h
        else:
            i, f, z, o = (a + b for a, b in zip(given, own, strict=True))
            f, o = 1 / (1 + torch.exp(-f)), 1 / (1 + torch.exp(-o))
            if cell == "lstm":
                others[0] = f * others[0] + torch.tanh(z) / (1 + torch.exp(-i))
                h = o * torch.tanh(others[0])
            else:
                c, n = f * c + torch.exp(i) * torch.tanh(z), f * n + torch.exp(i)
                h = o * c / n
        rows.append(h)
    return torch.stack(rows, 1)


def gradients(outputs: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.arange(1.0, outputs.numel() + 1, dtype=torch.float64).sin().view_as(outputs)
    return torch.autograd.grad((outputs * weights).sum(), leaves)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("length", [1, 2, 13, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_equations(backend: str, length: int, cell: str) -> None:
    inputs = [x if x is None else x.requires_grad_() for x in draw(cell, length)]
    leaves = [x for x in inputs if x is not None]
    expected = oracle(cell, *inputs)  # type: ignore[arg-type]
    h, last = form(backend, cell)(*inputs)
    torch.testing.assert_close(h, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last[:, 0], expected[:, -1], rtol=1e-10, atol=1e-10)
    for actual, wanted in zip(gradients(h, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_the_last_states(cell: str) -> None:
    """Those that reach every state, in both forms."""
    found = []
    for backend in BACKENDS:
        inputs = [x if x is None else x.requires_grad_() for x in draw(cell, 9)]
        h, last = form(backend, cell)(*inputs)
        both = torch.cat([h.flatten(), last.flatten()])
        found.append(gradients(both, [x for x in inputs if x is not None]))
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_carries_a_sequence_across_pieces(backend: str, cell: str) -> None:
    gates, recurrent, bias, _ = draw(cell, 21)
    assert gates is not None
    inputs = [gates.requires_grad_()]
    whole, last = form(backend, cell)(gates, recurrent, bias)
    head, state = form(backend, cell)(gates[:, :8], recurrent, bias)
    tail, state = form(backend, cell)(gates[:, 8:], recurrent, bias, state)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole)
    torch.testing.assert_close(state, last)
    # Also backward, though nothing goes through m.
    for actual, wanted in zip(
        gradients(torch.cat([head, tail], 1), inputs), gradients(whole, inputs), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("grad", [False, True])
def test_steps_equal_the_loop(grad: bool, cell: str) -> None:
    gates, recurrent, bias, state = draw(cell, 6)
    assert gates is not None
    assert state is not None
    expected, last = form("reference", cell)(gates, recurrent, bias, state)
    with torch.set_grad_enabled(grad):
        for t in range(6):
            given, kept = state, state.clone()
            h, state = step_form("torch", cell)(gates[:, t], recurrent, bias, given)
            torch.testing.assert_close(h, expected[:, t])
            assert (state is given) is not grad
            assert not grad or torch.equal(given, kept)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients_the_same(cell: str) -> None:
    inputs = [x if x is None else x.requires_grad_() for x in draw(cell, 9)]
    expected = form("torch", cell)(*inputs)
    with torch.no_grad():
        found = form("torch", cell)(*inputs)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_slstm_does_not_overflow(backend: str) -> None:
    """Input gates of several hundred, in float32: e^i is none."""
    gates, recurrent, bias, state = draw("slstm", 30, dtype=torch.float32)
    assert gates is not None
    assert state is not None
    gates[..., :5] *= 300
    gates.requires_grad_()
    h, last = form(backend, "slstm")(gates, recurrent, bias)
    (gradient,) = torch.autograd.grad(h.sum(), gates)
    assert torch.isfinite(h).all()
    assert torch.isfinite(last).all()
    assert torch.isfinite(gradient).all()
    exact, _ = form("reference", "slstm")(gates.double(), recurrent.double(), bias)
    torch.testing.assert_close(h.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_keeps_its_state_in_float32(backend: str, cell: str) -> None:
    h, state = form(backend, cell)(*draw(cell, 7, dtype=torch.bfloat16))
    assert (h.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_compiles_as_one_graph() -> None:
    inputs = [x if x is None else x.requires_grad_() for x in draw("gru", 2)]
    leaves = [x for x in inputs if x is not None]
    compiled = torch.compile(form("torch", "gru"), fullgraph=True, backend="aot_eager")
    expected, found = form("torch", "gru")(*inputs)[0], compiled(*inputs)[0]
    torch.testing.assert_close(found, expected)
    for actual, wanted in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_no_state_is_the_first_of_its_cell() -> None:
    gates, recurrent, bias, state = draw("slstm", 7)
    assert state is not None
    first = torch.zeros_like(state)
    first[:, 3] = EMPTY
    expected = form("torch", "slstm")(gates, recurrent, bias, first)
    for actual, wanted in zip(form("torch", "slstm")(gates, recurrent, bias), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_what_does_not_fit(backend: str) -> None:
    gates, recurrent, _, state = draw("lstm", 4)
    run = form(backend, "lstm")
    with pytest.raises(ValueError, match="length of 0"):
        run(gates[:, :0], recurrent, None, state)
    with pytest.raises(ValueError, match=r"gates has shape \[3, 4, 2, 15\]; it must be \[3, 4, 2, 20\]"):
        run(gates[..., :15], recurrent, None, state)
    with pytest.raises(ValueError, match=r"recurrent has shape \[2, 5, 15\]; it must be \[2, 5, 20\]"):
        run(gates, recurrent[..., :15], None, state)
    with pytest.raises(ValueError, match=r"bias has shape \[2, 5\]; it must be None"):
        run(gates, recurrent, recurrent[..., 0], state)
    with pytest.raises(ValueError, match=r"state has shape .*; it must be \[3, 2, 2, 5\]"):
        run(gates, recurrent, None, state[:, :1])
