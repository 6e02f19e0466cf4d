"""The canonical form of a stack: all stacks that are the same model at one width have one.

Genes that say what follows from the width are left off (`Mixer.canonical`); shares of the heads are applied
to the branches; branches beside one another are sorted; reuse of reuse is one reuse; what no layer reads is
not lent; a residual around one mixer with the model's place is that mixer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from math import gcd

from mixforge.search_space.loans import Place, trades, unread
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.settled import narrow, settle
from mixforge.search_space.stack import (
    Beside,
    Layer,
    Residual,
    Reuse,
    Segment,
    Unit,
    mixes_tokens,
    norms_input,
)

# Places that say nothing but whether there is a norm before each mixer, and after it.
_OF_MIXERS = {"none": (False, False), "pre": (True, False), "inside": (False, True), "sandwich": (True, True)}


def canonical(units: tuple[Unit, ...], width: int, place: str) -> tuple[Unit, ...]:
    """The one form of all stacks that are the same model as this one at this width and place of the norms."""
    found: list[Unit] = []
    for unit in units:
        found += canonical_unit(unit, width, place)
    settled = tuple(found)
    if not any(trades(unit, width) for unit in dict.fromkeys(settled)):
        return settled
    idle = unread(settled, width)
    return tuple(_without_owners(settled, (), idle, width, place)) if idle else settled


def _without_owners(
    units: tuple[Unit, ...], at: Place, idle: Mapping[Place, frozenset[str]], width: int, place: str
) -> Iterator[Unit]:
    for index, unit in enumerate(units):
        here = (*at, index)
        if not any(owner[: len(here)] == here for owner in idle):
            yield unit
            continue
        match unit:
            case Layer():
                changed: Unit = Layer(unit.mixer.unread(idle[(*here, 0)]))
            case Beside():
                branches = (
                    mixer.unread(idle[(*here, branch)]) if (*here, branch) in idle else mixer
                    for branch, mixer in enumerate(unit.branches)
                )
                changed = Beside(tuple(branches), unit.fuse, unit.shares, unit.norm)
            case Reuse() | Segment() | Residual():
                changed = replace(unit, body=tuple(_without_owners(unit.body, here, idle, width, place)))
        yield from canonical_unit(changed, width, place)


def canonical_unit(unit: Unit, width: int, place: str) -> tuple[Unit, ...]:
    """The one form of all units that are the same model as this one at this width and place of the norms."""
    if isinstance(unit, Layer):
        settled = settle(unit.mixer, width)
        return (unit if settled is unit.mixer else Layer(settled),)
    return _canonical_group(unit, width, place)


@lru_cache(maxsize=65_536)
def _canonical_group(unit: Beside | Reuse | Segment | Residual, width: int, place: str) -> tuple[Unit, ...]:
    match unit:
        case Beside():
            return (_canonical_beside(unit, width),)
        case Reuse():
            return _canonical_reuse(unit, width, place)
        case Residual():
            around = _canonical_residual(unit, width, place)
            is_plain = around.place is None and len(around.body) == 1
            return around.body if is_plain and not isinstance(around.body[0], Residual) else (around,)
        case Segment():
            body = tuple(each for inner in unit.body for each in canonical_unit(inner, width, place))
            # Layers that mix no tokens do the same in a segment as outside, unless it is a matrix that carries.
            carries = unit.carry != "tokens" or any(map(mixes_tokens, body))
            return (replace(unit, body=body),) if carries else body


def _canonical_beside(unit: Beside, width: int) -> Beside:
    branches = tuple([settle(mixer, width) for mixer in unit.branches])
    shares = unit.shares
    norm = None if unit.norm == unit.own_norm else unit.norm
    if shares is not None:
        total = sum(shares)
        try:
            branches = tuple(
                narrow(mixer, width, Fraction(share, total))
                for mixer, share in zip(branches, shares, strict=True)
            )
        except ValueError:
            common = gcd(*shares)
            pairs = sorted(zip(branches, (share // common for share in shares), strict=True), key=_by_json)
            branches, shares = tuple(mixer for mixer, _ in pairs), tuple(share for _, share in pairs)
            return Beside(branches, unit.fuse, shares, norm)
    return Beside(tuple(sorted(branches, key=_json)), unit.fuse, norm=norm)


def _json(mixer: Mixer) -> str:
    return mixer.json


def _by_json(pair: tuple[Mixer, int]) -> tuple[str, int]:
    return pair[0].json, pair[1]


def _canonical_residual(unit: Residual, width: int, place: str) -> Residual:
    body = tuple(
        [
            _canonical_residual(each, width, place)
            if isinstance(each, Residual)
            else canonical_unit(each, width, place)[0]
            for each in unit.body
        ]
    )
    said = unit.place or place
    mixers = [each for each in body if not isinstance(each, Residual)]
    reads = [each for each in mixers if not norms_input(each)]

    def norms(place: str) -> tuple[bool, bool]:
        before, after = _OF_MIXERS[place]
        return before and bool(reads), after and bool(mixers)

    if said in _OF_MIXERS:
        # Some have the same norms, where no mixer reads one or there is no mixer: the model's, or the first.
        same = [each for each in _OF_MIXERS if norms(each) == norms(said)]
        said = place if place in same else same[0]
    return Residual(body, None if said == place else said)


def _canonical_reuse(unit: Reuse, width: int, place: str) -> tuple[Unit, ...]:
    body = tuple(each for inner in unit.body for each in canonical_unit(inner, width, place))
    if unit.times == 1 and unit.signal == "none":
        return body
    # A single application has all the weight.
    halt = "none" if unit.times == 1 else unit.halt
    if len(body) == 1 and isinstance(body[0], Reuse) and unit.is_plain and body[0].is_plain:
        return (Reuse(unit.times * body[0].times, body[0].body),)
    return (replace(unit, body=body, halt=halt),)
