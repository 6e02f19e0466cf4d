"""Recurrent cells: the Triton form against the float64 loop, with every gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tolerance import assert_agree, assert_close
from torch import Tensor

from mixforge.kernels import recurrent_cells_triton
from mixforge.kernels.launch import recording
from mixforge.kernels.recurrent_cells import CELLS, form, step_form


def draw(cell: str, length: int, *, batch: int = 3, heads: int = 2, dim: int = 16) -> list[Tensor | None]:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(length))
    width = CELLS[cell].gates * dim
    state = normal(batch, len(CELLS[cell].first), heads, dim)
    if cell == "slstm":
        state[:, 2] = state[:, 2].abs() + 0.1
    bias = normal(heads, dim) if cell == "gru" else None
    return [normal(batch, length, heads, width), normal(heads, dim, width) / dim**0.5, bias, state]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("length", "dim", "batch", "heads"),
    [(1, 16, 3, 3), (2, 16, 17, 1), (13, 24, 3, 3), (13, 64, 1, 1), (65, 16, 3, 1)],
)
def test_equals_the_recurrence(length: int, dim: int, batch: int, heads: int, cell: str) -> None:
    inputs = draw(cell, length, batch=batch, heads=heads, dim=dim)
    assert_agree(form("triton", cell), form("reference", cell), inputs)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("length", "batch"), [(1, 3), (3, 17)])
def test_matrices_that_are_not_held(
    length: int, batch: int, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent_cells_triton, "HELD", {4: 16})
    inputs = draw(cell, length, batch=batch, heads=1, dim=24)
    assert_agree(form("triton", cell), form("reference", cell), inputs)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("held", [16, 24])
def test_steps_equal_the_loop_in_place(held: int, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_cells_triton, "HELD", {4: held})
    gates, recurrent, bias, state = draw(cell, 2, dim=24)
    expected, last = form("reference", cell)(gates, recurrent, bias, state)
    for t in range(2):
        h, after = step_form("triton", cell)(gates[:, t], recurrent, bias, state)
        assert after is state
        assert_close("h", h, expected[:, t])
    assert_close("last states", state, last)


def test_a_step_with_a_gradient_leaves_its_state() -> None:
    inputs = draw("gru", 1)
    before = inputs[-1].clone()

    def one(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda gates, *others: step_form(backend, "gru")(gates[:, 0], *others)

    assert_agree(one("triton"), one("torch"), inputs)
    assert torch.equal(inputs[-1], before)


def test_input_gates_of_several_hundred() -> None:
    """e^i is no float32; and there is no state before, so that m begins at -1e30."""
    gates, recurrent, *_ = draw("slstm", 9)
    gates[..., :16] *= 300
    inputs = [gates, recurrent, None, None]
    assert_agree(form("triton", "slstm"), form("reference", "slstm"), inputs, 1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_registered_with_torch(cell: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    gates, *others = draw(cell, 2, heads=1)
    leaves = [x if x is None else x.requires_grad_() for x in (gates, *others)]
    torch.library.opcheck(recurrent_cells_triton._forward, (cell, *leaves, True), test_utils=checks)
    step = [cell, gates[:, 0].detach().contiguous(), *(x if x is None else x.detach() for x in others)]
    torch.library.opcheck(recurrent_cells_triton._step, step, test_utils=checks)


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(form("triton", "gru"), fullgraph=True, backend="aot_eager")
    assert_agree(compiled, form("reference", "gru"), draw("gru", 3, heads=1))


@pytest.mark.parametrize(
    ("dim", "names"), [(64, ["forward", "backward"]), (65, ["forward_wide", "backward_wide"])]
)
def test_meta_tensors_are_written_down(dim: int, names: list[str]) -> None:
    inputs = [x if x is None else x.to("meta").requires_grad_() for x in draw("slstm", 300, dim=dim)]
    with recording("sm_90") as recorded:
        h, last = form("triton", "slstm")(*inputs)
        (h.sum() + last.sum()).backward()
    assert [one.name for one in recorded.launches] == [f"cell_{name}" for name in names]


def test_refuses_what_does_not_fit() -> None:
    gates, recurrent, _, state = draw("lstm", 4)
    run = form("triton", "lstm")
    with pytest.raises(ValueError, match=r"gates is torch\.float64"):
        run(gates.double(), recurrent.double(), None, state.double())
    with pytest.raises(ValueError, match=r"it must be \[3, 4, 2, 64\]"):
        run(gates[..., :48], recurrent, None, state)
    with pytest.raises(ValueError, match="it must be float32 and contiguous"):
        step_form("triton", "lstm")(gates[:, 0], recurrent, None, state.half())
