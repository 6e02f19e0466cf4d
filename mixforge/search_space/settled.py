"""What a mixer says of itself at a width, remembered: whether it is legal, and its canonical genes."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from mixforge.search_space.mixer import Mixer


@lru_cache(maxsize=65_536)
def settle(mixer: Mixer, width: int) -> Mixer:
    """The mixer with genes that say what follows from the width left off; an illegal one as it is."""
    return mixer if why_illegal(mixer, width) is not None else mixer.canonical(width)


@lru_cache(maxsize=65_536)
def why_illegal(mixer: Mixer, width: int) -> str | None:
    """None where it can be built at this width, else a sentence."""
    return mixer.fault or mixer.why_illegal(width)


def narrow(mixer: Mixer, width: int, share: Fraction) -> Mixer:
    """`Mixer.narrow`, settled. Raises ValueError where the part is not legal by itself."""
    part = mixer.narrow(width, share)
    reason = why_illegal(part, width)
    if reason is not None:
        raise ValueError(f"a share of {share} leaves a mixer that is illegal: {reason}")
    return settle(part, width)
