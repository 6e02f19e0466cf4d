"""The board: one line a worker says how far its training is, one file for all of them.

Workers write a few dozen bytes into a shared memory mapping, so that a report costs a microsecond, needs no
process of its own and stays readable when the worker hangs. It reaches as far as one machine's files do.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

_LINE = struct.Struct("<qqqqd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How far one evaluation is."""

    task: int
    """Which of the budget's tasks it trains for, from 0."""
    step: int
    """Steps done, of all its trainings together."""
    steps: int
    """Steps that all its trainings have."""
    loss: float
    """Nats per predicted token of the last batch."""


class Board:
    """`slots` lines in the file at `path`, made by `create` and written by the workers, each its own line."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._lines = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path, slots: int) -> Board:
        path.write_bytes(bytes(_LINE.size * slots))
        return cls(path)

    def write(self, slot: int, token: int, mark: Mark) -> None:
        """Say how far the attempt with this token is."""
        _LINE.pack_into(self._lines, slot * _LINE.size, token, mark.task, mark.step, mark.steps, mark.loss)

    def read(self, slot: int, token: int) -> Mark | None:
        """What the attempt with this token last said; None where it has said nothing yet."""
        said, task, step, steps, loss = _LINE.unpack_from(self._lines, slot * _LINE.size)
        return Mark(task=task, step=step, steps=steps, loss=loss) if said == token else None

    def close(self) -> None:
        self._lines.close()
