"""What one layer owns and later layers read: who lends, who borrows, and whether they fit.

A mixer lends and borrows by name: `cache`, the keys and values of all tokens so far (Sun et al. 2024, arXiv
2405.05254, whose cross-decoder layers all read one cache); `values`, those of the tokens of this pass; `experts`,
weights. A reader reads what the nearest owner of that name below it lends.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from mixforge.search_space.mixer import Loan, Mixer
from mixforge.search_space.spelling import spell_mixer
from mixforge.search_space.stack import Beside, Layer, Reuse, Unit, mixers

Place = tuple[int, ...]
"""Of a mixer in a stack: the index of its unit, of each unit inside a reused one, and of its branch."""


@lru_cache(maxsize=65_536)
def trades(unit: Unit, width: int) -> bool:
    """Whether a mixer in it lends or borrows."""
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


def unread(units: tuple[Unit, ...], width: int) -> dict[Place, frozenset[str]]:
    """The places of owners, and what of theirs no layer reads before the next owner of that name."""
    idle: dict[Place, set[str]] = {}
    read: set[tuple[Place, str]] = set()
    last: dict[str, Place] = {}
    for place, mixer in applications(units):
        read |= {(last[name], name) for name in mixer.borrows(width) if name in last}
        for name in mixer.lends(width):
            idle.setdefault(place, set()).add(name)
            last[name] = place
    found = {
        place: frozenset(name for name in names if (place, name) not in read) for place, names in idle.items()
    }
    return {place: names for place, names in found.items() if names}


def why_unowned(units: tuple[Unit, ...], width: int) -> str | None:
    """A sentence on the first reader without a fitting owner before it; None where all fit."""
    owners: dict[str, tuple[Place, Mixer]] = {}
    for place, mixer in applications(units):
        for name, loan in mixer.borrows(width).items():
            reason = _why_unfit(name, loan, owners.get(name), place, width)
            if reason is not None:
                return f"layer {place[0] + 1}: {spell_mixer(mixer, width)} {reason}"
        owners |= dict.fromkeys(mixer.lends(width), (place, mixer))
    return None


# What to write where a reader has no owner.
_REMEDIES = {
    "cache": "put an owner such as attn(kv=own) there",
    "values": "put an owner, the same mixer with values=own, there",
    "experts": "put an owner, the same mixer with weights=own, there",
}


def _why_unfit(
    name: str, needed: Loan, owner: tuple[Place, Mixer] | None, place: Place, width: int
) -> str | None:
    noun = {"cache": "a shared cache", "values": "shared values", "experts": "shared experts"}[name]
    if owner is None:
        return f"reads {noun} that no layer before it owns; {_REMEDIES[name]}"
    if owner[0][:-1] == place[:-1] and owner[0] != place:
        return f"cannot read the {name} of a mixer beside it; put the owner in a layer before it"
    lent = owner[1].lends(width)[name]
    if lent == needed:
        return None
    each = "" if needed.extent == "weights" else " a token"
    return f"reads {noun} of {needed}{each}, but {spell_mixer(owner[1], width)} before it owns {lent}"
