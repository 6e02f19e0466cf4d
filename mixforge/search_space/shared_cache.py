"""Caches that one layer owns and later layers read: who lends, who borrows, and whether they fit.

Source: Sun et al. 2024 (arXiv 2405.05254), whose cross-decoder layers all read one cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from mixforge.search_space.mixer import Mixer
from mixforge.search_space.spelling import spell_mixer
from mixforge.search_space.stack import Beside, Layer, Reuse, Unit, mixers

Place = tuple[int, ...]
"""Of a mixer in a stack: the index of its unit, of each unit inside a reused one, and of its branch."""


@lru_cache(maxsize=65_536)
def trades(unit: Unit, width: int) -> bool:
    """Whether a mixer in it lends or borrows a cache."""
    return any(mixer.lends(width) or mixer.borrows(width) for mixer in mixers((unit,)))


def applications(units: tuple[Unit, ...], place: Place = ()) -> Iterator[tuple[Place, Mixer]]:
    """Mixers and their places in the order in which they are applied; repeated applications at most twice."""
    for index, unit in enumerate(units):
        match unit:
            case Layer():
                yield (*place, index, 0), unit.mixer
            case Beside():
                yield from (((*place, index, branch), mixer) for branch, mixer in enumerate(unit.branches))
            case Reuse():
                for _ in range(min(unit.times, 2)):
                    yield from applications(unit.body, (*place, index))


def owners(units: tuple[Unit, ...], width: int) -> dict[Place, bool]:
    """The place of every mixer that lends a cache, and whether one reads it before the next owner."""
    found: dict[Place, bool] = {}
    last: Place | None = None
    for place, mixer in applications(units):
        if last is not None and mixer.borrows(width) is not None:
            found[last] = True
        if mixer.lends(width) is not None:
            found.setdefault(place, False)
            last = place
    return found


def why_cacheless(units: tuple[Unit, ...], width: int) -> str | None:
    """A sentence on the first reader of a cache without a fitting owner before it; None where all fit."""
    owner: tuple[Place, Mixer] | None = None
    for place, mixer in applications(units):
        if mixer.borrows(width) is not None:
            reason = _why_unfit(owner, place, mixer, width)
            if reason is not None:
                return f"layer {place[0] + 1}: {spell_mixer(mixer, width)} {reason}"
        if mixer.lends(width) is not None:
            owner = place, mixer
    return None


def _why_unfit(owner: tuple[Place, Mixer] | None, place: Place, reader: Mixer, width: int) -> str | None:
    if owner is None:
        return "reads a shared cache that no layer before it owns; put an owner such as attn(kv=own) there"
    if owner[0][:-1] == place[:-1] and owner[0] != place:
        return "cannot read the cache of a mixer beside it; put the owner in a layer before it"
    lent, needed = owner[1].lends(width), reader.borrows(width)
    if lent == needed:
        return None
    had, wants = (" x ".join(map(str, shape or ())) for shape in (lent, needed))
    return f"reads a cache of {wants} a token, but {spell_mixer(owner[1], width)} before it owns {had}"
