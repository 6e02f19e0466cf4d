"""A deadline of our own, looked at between steps: a candidate that overruns it is an outcome."""

from __future__ import annotations

import time


class TimedOut(Exception):
    """An evaluation ran past its deadline."""


class Deadline:
    """So many seconds of monotonic time from when it was made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._started

    def check(self, doing: str) -> None:
        """Raises TimedOut where the time is over. `doing` says what was cut short."""
        if self.spent_s > self.seconds:
            raise TimedOut(f"ran past the deadline of {self.seconds:g} s while {doing}")
