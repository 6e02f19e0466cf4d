"""How many of something there are, in words."""

from __future__ import annotations


def counted(number: float, noun: str, text: str | None = None) -> str:
    """`1 trial`, `6 trials`, `0 trials`. `text`: how the number is written, where it is not as `str` writes it."""
    return f"{number if text is None else text} {noun}{'' if number == 1 else 's'}"
