"""From branches that each have a part of the heads back to `2*a | b`: the whole mixers and their shares.

The canonical form of an intra-layer hybrid holds narrowed mixers, `attn(heads=1, head_dim=64)`. People write
the whole ones and a factor. What is found here is checked by narrowing it again, so it says the same model,
or is not said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement, permutations, product

from mixforge.search_space.genes import Form, GeneValue
from mixforge.search_space.genes import replace as with_genes
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.settled import narrow, settle, why_illegal
from mixforge.search_space.stack import Beside, gene_defaults

# Shares are looked for up to this sum: 2:1, 3:1 and 2:1:5 are found, 9:1 is not.
LARGEST_SUM = 8


def shared_forms(unit: Beside, width: int) -> Iterator[Beside]:
    """Ways to say a canonical `Beside` by whole mixers and shares."""
    for total in range(len(unit.branches), LARGEST_SUM + 1):
        for shares in _splits(total, len(unit.branches)):
            whole = [
                wholes(mixer, width, Fraction(share, total))
                for mixer, share in zip(unit.branches, shares, strict=True)
            ]
            for branches in product(*whole):
                yield replace(unit, branches=branches, shares=shares)


@lru_cache(maxsize=64)
def _splits(total: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """The ways to write `total` as an ordered sum of `parts` numbers without a common factor."""
    sums = (each for each in combinations_with_replacement(range(1, total), parts) if sum(each) == total)
    return tuple(sorted({order for each in sums if _coprime(each) for order in permutations(each)}))


def _coprime(numbers: tuple[int, ...]) -> bool:
    return all(any(number % factor for number in numbers) for factor in range(2, max(numbers) + 1))


@lru_cache(maxsize=16_384)
def wholes(mixer: Mixer, width: int, share: Fraction) -> tuple[Mixer, ...]:
    """Mixers of which this one is `share` of the heads."""
    found: dict[Mixer, None] = {}
    for candidate in dict.fromkeys(_candidates(mixer, share)):
        if why_illegal(candidate, width) is not None:
            continue
        try:
            narrowed = narrow(candidate, width, share)
        except ValueError:
            continue
        if narrowed == mixer:
            found[settle(candidate, width)] = None
    return tuple(found)


def _candidates(mixer: Mixer, share: Fraction) -> Iterator[Mixer]:
    """The mixer with its sizes as in a famous point, all but one of them, and its numbers of heads scaled up.

    Sizes are the genes that may follow from the width, which are those whose default is None.
    """
    defaults = gene_defaults(type(mixer))
    sizes = [name for name, default in defaults.items() if default is None]
    forms = {
        name: Form(value.name, tuple(_scaled(each, share) for each in value.arguments))
        for name in defaults
        if isinstance(value := getattr(mixer, name), Form)
    }
    for genes in ({}, *mixer.aliases.values()):
        if any(name not in sizes and getattr(mixer, name) != value for name, value in genes.items()):
            continue
        point: dict[str, GeneValue] = {name: genes.get(name) for name in sizes}
        kept = [{}, *({name: value} for name in sizes for value in _kept(getattr(mixer, name), share))]
        for one, more in product(kept, ({}, forms)):
            yield with_genes(mixer, **{**point, **one, **more})


def _kept(value: GeneValue, share: Fraction) -> tuple[GeneValue, ...]:
    return (value, _scaled(value, share)) if isinstance(value, int | float) else ()


def _scaled(value: int | float, share: Fraction) -> int | float:
    if isinstance(value, float):
        return float(value / share)
    whole = value / share
    return int(whole) if whole.denominator == 1 else value
