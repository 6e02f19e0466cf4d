"""Which points of a mixer's gene space the contract tests look at.

`famous`: the default and every alias. `singles`: those, and each legal value of each gene with all others at their
default. `pairs`: a covering array of strength two, over one value of each domain of numbers. Rows are taken
greedily (as in Cohen et al. 1997, the AETG system): each row starts from the uncovered pair of (gene, value) that
comes first, is filled up at random around it, and of five such rows the one that covers most new pairs is kept. A
pair counts as covered where both values are still there in the row's canonical form, so that a gene without effect
covers nothing; a pair that no row in ten tries makes legal is given up. Everything follows from the mixer's name,
so the array is the same in every process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from itertools import chain, combinations
from typing import get_type_hints

from mixforge.search_space.genes import Call, Choice, Domain, Form, GeneValue, Real, Whole
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.mixers import CATALOGUE
from mixforge.search_space.settled import why_illegal

WIDTH = 24
CANDIDATES = 5
TRIES = 10

Setting = tuple[str, GeneValue]
Pair = tuple[Setting, Setting]


def values(domain: Domain) -> list[GeneValue]:
    """A few legal values, small enough to test, the likeliest to fit others first."""
    match domain:
        case Choice():
            return list(domain.names)
        case Whole():
            return [value for value in (2, 3) if domain.has(value)] or [domain.low]
        case Real():
            return [value for value in (0.5, 1.25, 2) if domain.has(value)] or [domain.low]
        case Call():
            each = [values(argument) for argument in domain.arguments]
            count = min(2, max(map(len, each)))
            return [Form(domain.name, tuple(some[n % len(some)] for some in each)) for n in range(count)]  # type: ignore[misc]


@cache
def genes(mixer: type[Mixer], most: int = 3) -> dict[str, tuple[GeneValue, ...]]:
    """The values of each gene that are tested: its default, all names, and at most so many of a domain of numbers."""
    hints = get_type_hints(mixer, include_extras=True)
    found: dict[str, tuple[GeneValue, ...]] = {}
    for field in fields(mixer):
        if field.init:
            some = [
                v if isinstance(d, Choice) else v[:most]
                for d in hints[field.name].__metadata__
                for v in [values(d)]
            ]
            found[field.name] = tuple(dict.fromkeys([field.default, *chain.from_iterable(some)]))
    return found


@cache
def famous(word: str) -> tuple[Mixer, ...]:
    """The default and every alias, in canonical form, where they are legal at this width."""
    mixer = CATALOGUE[word]
    found = [mixer(), *(mixer(**given) for given in mixer.aliases.values())]
    return tuple(dict.fromkeys(each.canonical(WIDTH) for each in found if why_illegal(each, WIDTH) is None))


@cache
def singles(word: str) -> tuple[Mixer, ...]:
    """The legal ones among the default, the aliases and each gene's values in turn, in canonical form."""
    mixer = CATALOGUE[word]
    each_gene = [replace(mixer(), **{name: value}) for name, some in genes(mixer).items() for value in some]
    legal = (each.canonical(WIDTH) for each in each_gene if why_illegal(each, WIDTH) is None)
    return tuple(dict.fromkeys([*famous(word), *legal]))


@cache
def pairs(word: str) -> tuple[Mixer, ...]:
    """The rows of the covering array, in canonical form, without those that `singles` has."""
    mixer = CATALOGUE[word]
    rng = random.Random(word)
    bases = [_genes_of(mixer(**given)) for given in ({}, *mixer.aliases.values())]
    left = dict.fromkeys(_all_pairs(mixer))
    rows: dict[Mixer, None] = {}
    for row in singles(word):
        _cover(row, left)
    while left:
        target = next(iter(left))
        found: list[Mixer] = []
        for _ in range(TRIES):
            row = _row(mixer, rng.choice(bases), target, rng)
            if row is not None and set(target) <= set(_settings(row)):
                found.append(row)
            if len(found) == CANDIDATES:
                break
        if not found:
            del left[target]
            continue
        best = max(found, key=lambda row: sum(pair in left for pair in _pairs(row)))
        rows[best] = None
        _cover(best, left)
    return tuple(row for row in rows if row not in singles(word))


def _all_pairs(mixer: type[Mixer]) -> Iterator[Pair]:
    for (a, some), (b, others) in combinations(genes(mixer, 1).items(), 2):
        yield from (((a, x), (b, y)) for x in some for y in others)


def _genes_of(row: Mixer) -> dict[str, GeneValue]:
    return {name: getattr(row, name) for name in genes(type(row))}


def _settings(row: Mixer) -> list[Setting]:
    return list(_genes_of(row).items())


def _pairs(row: Mixer) -> Iterator[Pair]:
    return combinations(_settings(row), 2)


def _cover(row: Mixer, left: dict[Pair, None]) -> None:
    for pair in _pairs(row):
        left.pop(pair, None)


def _row(kind: type[Mixer], base: dict[str, GeneValue], target: Pair, rng: random.Random) -> Mixer | None:
    """A legal row with the target's values, other genes changed one by one where that stays legal."""
    # Genes as a dictionary: `dataclasses.replace` takes three times as long as making a mixer of it.
    wanted = dict(target)
    given = {**base, **wanted}
    choices = genes(kind, 1)
    names = [name for name in choices if name not in wanted]
    rng.shuffle(names)
    row = kind(**given)
    legal = row if row.why_illegal(WIDTH) is None else None
    for name in names:
        if rng.random() < 0.5:
            value = rng.choice(choices[name])
            if value == given[name]:
                continue
            changed = {**given, name: value}
            row = kind(**changed)
            if row.why_illegal(WIDTH) is None:
                given, legal = changed, row
            elif legal is None:
                given = changed
    return None if legal is None else legal.canonical(WIDTH)
