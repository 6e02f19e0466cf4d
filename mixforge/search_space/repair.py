"""Repair: a sentence that is illegal or over a limit, brought inside by the smallest changes that local moves find.

Rejection alone finds nothing where few sentences keep to the limits. From the drawn sentence, greedy rounds: of a
sample of single moves (a choice to another option, an item more or fewer), the nearest that is inside is taken. Where
none is, the moves are made one after another, those first that bring it nearest for the fewest edits. At the end
every choice that was changed is put back where the sentence stays inside. What comes out is a candidate as any other,
but not drawn by the grammar's weights.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.derivation import Derivation
from mixforge.search_space.distance import distance
from mixforge.search_space.grammar import Rejection, Space, weighted
from mixforge.search_space.legality import illegality
from mixforge.search_space.mutation import MUTATIONS, mutate
from mixforge.search_space.notation import TooDeep
from mixforge.search_space.production import Overgrown
from mixforge.search_space.syntax import NotationError

MOST_STARTS = 4
"""How often it begins anew where no move leads on, each time one mutation further from the drawn sentence."""

MOST_ROUNDS = 24
MOST_MOVES = 40
"""Moves that are tried in a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """A candidate, and the sentence that it was made from."""

    architecture: Architecture
    derivation: Derivation
    drawn: Derivation
    changes: int
    """The distance between the two."""


def repair(space: Space, drawn: Derivation, rng: random.Random) -> Repaired | None:
    """The sentence with the smallest changes found that make it legal and bring it within the limits.

    None where no way inside was found. A sentence that is inside is given back as it is.
    """
    for start in range(MOST_STARTS):
        at = _brought_inside(space, _aside(space, drawn, start, rng), rng)
        if at is not None:
            at = _undone(space, drawn, at)
            found = space.admit(at)
            assert isinstance(found, Architecture)
            return Repaired(architecture=found, derivation=at, drawn=drawn, changes=distance(drawn, at))
    return None


def _aside(space: Space, drawn: Derivation, changes: int, rng: random.Random) -> Derivation:
    """The drawn sentence after so many mutations, so that another way may lead inside."""
    at = drawn
    for _ in range(changes if drawn.choices else 0):
        at = mutate(space, at, rng).derivation
    return at


def _brought_inside(space: Space, at: Derivation, rng: random.Random) -> Derivation | None:
    outside = _outside(space, at)
    for _ in range(MOST_ROUNDS):
        if outside == _INSIDE:
            return at
        before = outside
        at, outside = _round(space, at, outside, rng)
        if outside == before:
            return None
    return None


def draw_or_repair(space: Space, rng: random.Random) -> Repaired | Rejection:
    """A drawn sentence where it is a candidate, or one repaired from it; why it is none where that fails too."""
    try:
        drawn = space.draw(rng)
    except Overgrown as error:
        return Rejection("too many decisions", str(error))
    found = space.admit(drawn)
    if isinstance(found, Architecture):
        return Repaired(architecture=found, derivation=drawn, drawn=drawn, changes=0)
    return repair(space, drawn, rng) or found


_Outside = tuple[int, float]
"""Faults, and where there are none, by how much the limits are passed."""

_INSIDE: _Outside = (0, 0.0)


def _outside(space: Space, derivation: Derivation) -> _Outside:
    try:
        architecture = derivation.architecture
    except TooDeep:
        # No layer can be looked at; fewer decisions make fewer layers.
        return (1_000_000 + len(derivation.choices), 0.0)
    except NotationError:
        return (1_000_000, 0.0)
    if architecture.illegality() is None:
        return (0, sum(limit.excess(architecture) for limit in space.limits))
    faults = [illegality((unit,), architecture.width) for unit in dict.fromkeys(architecture.stack)]
    broken = sum(1 for found in faults if found is not None and found.fault in ("genes", "shares"))
    return (max(1, broken), 0.0)


def _round(
    space: Space, at: Derivation, outside: _Outside, rng: random.Random
) -> tuple[Derivation, _Outside]:
    """Nearer by one move that is enough, or else by the best of many, one after another."""
    nearer: list[tuple[tuple[float, ...], int, Derivation, _Outside]] = []
    for number, move in enumerate(_moves(space, at, rng)):
        there = _outside(space, move)
        if there >= outside:
            continue
        far = distance(at, move)
        if there == _INSIDE:
            merit: tuple[float, ...] = (0, far)
        elif there[0] < outside[0]:
            merit = (1, there[0] - outside[0], far)
        else:
            merit = (2, (there[1] - outside[1]) / far)
        nearer.append((merit, number, move, there))
    if not nearer:
        return at, outside
    nearer.sort(key=lambda each: each[:2])
    _, _, reached, outside = nearer[0]
    if reached.picks.keys() != at.picks.keys():
        return reached, outside
    # An item more or fewer gives other names to what is behind it, so only changes of choices are made together.
    for _, _, move, _ in nearer[1:]:
        if outside == _INSIDE:
            break
        changed = {name: option for name, option in move.picks.items() if at.picks.get(name) != option}
        if len(changed) == 1 and move.picks.keys() == at.picks.keys():
            both = _replayed(space, {**reached.picks, **changed}, reached, rng)
            there = outside if both is None else _outside(space, both)
            if both is not None and there < outside:
                reached, outside = both, there
    return reached, outside


def _moves(space: Space, at: Derivation, rng: random.Random) -> Iterator[Derivation]:
    """Single choices changed, at most MOST_MOVES of them by chance, and items added and taken away."""
    changes = [
        (choice.name, option) for choice in at.choices for option in choice.options if option != choice.taken
    ]
    for name, option in rng.sample(changes, min(len(changes), MOST_MOVES)):
        changed = _replayed(space, {**at.picks, name: option}, at, rng)
        if changed is not None:
            yield changed
    for operator in ("delete", "insert"):
        for _ in range(4):
            try:
                varied = MUTATIONS[operator](space, at, rng)
            except Overgrown:
                continue
            if varied is not None:
                yield varied.derivation


def _replayed(
    space: Space, picks: Mapping[str, str], parent: Derivation, rng: random.Random
) -> Derivation | None:
    """The sentence with these picks; None where it grows too long."""
    try:
        return space.replay(picks, weighted(rng), parent)
    except Overgrown:
        return None


def _undone(space: Space, drawn: Derivation, at: Derivation) -> Derivation:
    """The repaired sentence with every change taken back that was not needed."""

    def first(name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
        taken = drawn.picks.get(name)
        return options.index(taken) if taken in options else 0

    for name in drawn.picks:
        if at.picks.get(name, drawn.picks[name]) == drawn.picks[name]:
            continue
        try:
            back = space.replay({**at.picks, name: drawn.picks[name]}, first, at)
        except Overgrown:
            continue
        if distance(drawn, back) < distance(drawn, at) and _outside(space, back) == _INSIDE:
            at = back
    return at
