"""How many heads a mixer has when its gene says nothing. Loads no torch."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

# Channels of a head that the default number of heads aims at: 64 as in most published models, and half of it in
# small ones, which would have one or two heads otherwise.
USUAL_HEAD_DIM = 64
SMALL_WIDTH = 256


@lru_cache(maxsize=4_096)
def default_heads(width: int) -> int:
    """The most heads that divide `width` into 64 channels or more each (32 below a width of 256), at least 1."""
    least = USUAL_HEAD_DIM if width >= SMALL_WIDTH else USUAL_HEAD_DIM // 2
    return next(heads for heads in range(max(1, width // least), 0, -1) if width % heads == 0)


def shared_heads(name: str, heads: int, share: Fraction) -> int:
    """`share` of `heads`. Raises ValueError where that is no whole number."""
    part = heads * share
    if part.denominator != 1:
        raise ValueError(
            f"a share of {share} of {name}'s {heads} heads is {float(part):g} heads; "
            f"give it heads that {share.denominator} divides"
        )
    return int(part)


def heads_that_divide(width: int) -> str:
    """Legal numbers of heads for an error message: `1, 2, 4, 8`."""
    return ", ".join(str(heads) for heads in range(1, min(width, 64) + 1) if width % heads == 0)


def undivided(mixer: str, heads: int, width: int, instead: str = "head_dim") -> str:
    """The refusal of heads that do not divide the width; `instead` is what may be said in their place."""
    return (
        f"heads {heads} does not divide width {width} (mixer {mixer}); "
        f"legal heads: {heads_that_divide(width)}, or say {instead}"
    )
