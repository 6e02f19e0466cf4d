"""A part of a mixer and what it costs: what is built and what is counted are made in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mixforge.search_space.part import Part


class Piece(NamedTuple):
    """`part` makes the part, as costs are asked of many more mixers than are built; None where there is nothing to build.

    params: its weights. macs: multiply-adds of its matrix products for each token.
    """

    part: Callable[[], Part] | None = None
    params: int = 0
    macs: int = 0


NOTHING = Piece()
