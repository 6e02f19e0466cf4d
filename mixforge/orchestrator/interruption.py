"""Ctrl-C and SIGTERM as a question the loop asks, instead of an exception in the middle of a transaction."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Which signal asked the search to stop, and how often."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.times = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal, self.times = number, self.times + 1


@contextmanager
def listening() -> Iterator[Interruption]:
    """Takes the two signals for as long as the block lasts. Outside the main thread, where none arrive, it
    does not.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption.note) for number in _SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
