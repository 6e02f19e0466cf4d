"""A part of a mixer and what it costs: what is built and what is counted are made in one place."""

from __future__ import annotations

from dataclasses import dataclass

from mixforge.search_space.part import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`part` is None where there is nothing to build.

    params: its weights. macs: multiply-adds of its matrix products for each token.
    """

    part: Part | None = None
    params: int = 0
    macs: int = 0


NOTHING = Piece()
