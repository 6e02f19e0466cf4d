"""The gene `expand` of channel mixers: the hidden width over the model's width. Loads no torch."""

from __future__ import annotations

from functools import lru_cache

NARROWEST = 0.125
WIDEST = 32


def hidden_width(expand: int | float, width: int) -> int:
    """The hidden width that `expand` means: the nearest whole number, at least 1."""
    return max(1, round(expand * width))


@lru_cache(maxsize=4096)
def shortest_expand(expand: int | float, width: int, narrowest: int | float = NARROWEST) -> int | float:
    """The number with the fewest digits, from `narrowest` up, that means the same hidden width: one for each model."""
    hidden = hidden_width(expand, width)
    for digits in range(8):
        short = round(hidden / width, digits)
        if narrowest <= short <= WIDEST and hidden_width(short, width) == hidden:
            return int(short) if short.is_integer() else short
    # Where the hidden width over the model's is below the range, its end is what means that width.
    return narrowest if hidden_width(narrowest, width) == hidden else expand
