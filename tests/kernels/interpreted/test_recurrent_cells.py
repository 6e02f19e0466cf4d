"""Recurrent cells: the Triton form against the float64 loop, with every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from mixforge.kernels.recurrent_cells import CELLS, form


def draw(cell: str, length: int, *, batch: int = 3, heads: int = 2, dim: int = 16) -> list[Tensor | None]:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(length))
    width = CELLS[cell].gates * dim
    state = normal(batch, len(CELLS[cell].first), heads, dim)
    if cell == "slstm":
        state[:, 2] = state[:, 2].abs() + 0.1
    bias = normal(heads, dim) if cell == "gru" else None
    return [normal(batch, length, heads, width), normal(heads, dim, width) / dim**0.5, bias, state]


def wide(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in inputs]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("length", [1, 13, 65])
def test_forward(length: int, cell: str) -> None:
    inputs = draw(cell, length)
    with torch.no_grad():
        found, expected = form("triton", cell)(*inputs), form("reference", cell)(*wide(inputs))
    for name, actual, wanted in zip(("h", "last states"), found, expected, strict=True):
        assert_close(name, actual, wanted)
