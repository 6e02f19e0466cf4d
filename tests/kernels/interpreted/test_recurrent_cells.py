"""Recurrent cells: the Triton form against the float64 loop, with every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tolerance import assert_agree
from torch import Tensor

from mixforge.kernels import recurrent_cells_triton
from mixforge.kernels.recurrent_cells import CELLS, form


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
    ("length", "dim", "batch", "heads"), [(1, 16, 3, 3), (13, 24, 17, 3), (13, 64, 1, 1), (65, 16, 3, 1)]
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
    inputs = draw(cell, length, batch=batch, dim=24)
    assert_agree(form("triton", cell), form("reference", cell), inputs)
