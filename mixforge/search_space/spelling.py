"""The canonical text of an architecture: the shortest names, and repeats factored by one deterministic rule.

The rule: of all ways to write the flat sequence of units with `n * (...)`, take the one with the fewest
characters; among those, the one in which the fewest groups begin with a channel mixer; among those, the first
that is found when places, then periods, then counts are tried in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

from mixforge.search_space.genes import GeneValue
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.settled import settle
from mixforge.search_space.shares import shared_forms
from mixforge.search_space.stack import Beside, Layer, Residual, Reuse, Segment, Unit, gene_defaults
from mixforge.search_space.syntax import spell_number

# Longer groups are not looked for, which keeps the search in a stack of a thousand layers short.
LONGEST_GROUP = 128


def spell_architecture(units: tuple[Unit, ...], width: int, words: tuple[tuple[str, str], ...]) -> str:
    """`lm(stack, width=..., ...)` with the given words in order."""
    return f"lm({spell_stack(units, width)}, {', '.join(f'{word}={value}' for word, value in words)})"


@lru_cache(maxsize=65_536)
def spell_mixer(mixer: Mixer, width: int) -> str:
    """The mixer under the name that leaves the fewest genes to say; an alias before the mixer's own name.

    An alias takes further genes, but none that the alias itself sets.
    """
    plain = dict(_changed(mixer, gene_defaults(type(mixer))))
    found = [(len(plain), True, _call(mixer.word(), plain))]
    for alias, genes in mixer.aliases.items():
        found += [(len(said), False, _call(alias, said)) for said in _beyond_alias(mixer, genes, width)]
    return min(found, key=lambda each: (each[0], each[1], len(each[2]), each[2]))[2]


def _beyond_alias(mixer: Mixer, genes: Mapping[str, GeneValue], width: int) -> Iterator[dict[str, GeneValue]]:
    """The genes to say after an alias so that it means this mixer, where there are such."""
    famous = type(mixer)(**genes)
    # At this width a gene that the alias sets may follow from the width, and so be left off.
    for point in (famous, settle(famous, width)):
        said = dict(_changed(mixer, {name: getattr(point, name) for name in gene_defaults(type(mixer))}))
        if said.keys().isdisjoint(genes) and settle(type(mixer)(**{**genes, **said}), width) == mixer:
            yield said


def _changed(mixer: Mixer, point: dict[str, GeneValue]) -> Iterator[tuple[str, GeneValue]]:
    for name, value in point.items():
        given = getattr(mixer, name)
        if given != value:
            yield name, given


def _call(name: str, genes: dict[str, GeneValue]) -> str:
    return (
        f"{name}({', '.join(f'{gene}={spell_gene(value)}' for gene, value in genes.items())})"
        if genes
        else name
    )


def spell_gene(value: GeneValue) -> str:
    """A gene's value as it is written: `64`, `rope`, `gqa(4)`; `auto` for what follows from the width."""
    if value is None:
        return "auto"
    return spell_number(value) if isinstance(value, int | float) else str(value)


def spell_unit(unit: Unit, width: int) -> tuple[str, bool]:
    """A unit's text, and whether it can stand behind an operator without brackets."""
    match unit:
        case Layer():
            return spell_mixer(unit.mixer, width), True
        case Beside():
            return _spell_beside(unit, width)
        case Reuse():
            body, closed = _Factoring(unit.body, width).whole()
            if unit.is_plain:
                return f"{unit.times} @ {body if closed else f'({body})'}", False
            words = {"times": str(unit.times), "halt": unit.halt, "signal": unit.signal}
            said = (f"{word}={value}" for word, value in words.items() if value != "none")
            return f"reuse({body}, {', '.join(said)})", True
        case Segment():
            body = spell_stack(unit.body, width)
            carry = "" if unit.carry == "tokens" else f", carry={unit.carry}"
            return f"segment({body}, length={unit.length}, memory={unit.memory}{carry})", True
        case Residual():
            place = "" if unit.place is None else f", place={unit.place}"
            return f"residual({spell_stack(unit.body, width)}{place})", True


@lru_cache(maxsize=16_384)
def _spell_beside(unit: Beside, width: int) -> tuple[str, bool]:
    """The shortest text; by shares of whole mixers where that is shorter than the narrowed mixers."""
    texts = [_join_branches(unit, width)]
    if unit.shares is None:
        texts += [_join_branches(form, width) for form in shared_forms(unit, width)]
    return min(texts, key=lambda text: (len(text), text)), not unit.is_plain


def _join_branches(unit: Beside, width: int) -> str:
    branches = [spell_mixer(mixer, width) for mixer in unit.branches]
    if unit.shares is not None:
        # A share of 1 is written only where no other share says that there are shares.
        even = max(unit.shares) == 1
        shares = [f"{share} * " if share > 1 or even else "" for share in unit.shares]
        branches = [share + text for share, text in zip(shares, branches, strict=True)]
    if unit.is_plain:
        return " | ".join(branches)
    words = [] if unit.fuse == "sum" else [f"fuse={unit.fuse}"]
    words += [] if unit.norm is None else [f"norm={unit.norm}"]
    return f"beside({', '.join([*branches, *words])})"


def spell_stack(units: tuple[Unit, ...], width: int) -> str:
    """Units as one expression, their repeats factored."""
    return _Factoring(units, width).whole()[0]


class _Factoring:
    """The shortest way to write one sequence of units."""

    def __init__(self, units: tuple[Unit, ...], width: int) -> None:
        numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
        kinds = list(numbers)
        # Each distinct unit is one character, so that stretches of the stack can be compared and remembered
        # as text.
        self.sequence = "".join(chr(numbers[unit]) for unit in units)
        self.texts = [spell_unit(unit, width) for unit in kinds]
        self.channel = [isinstance(unit, Layer) and unit.mixer.kind == "channel" for unit in kinds]
        self.loose = [isinstance(unit, Beside) and unit.is_plain for unit in kinds]
        self.known: dict[str, tuple[str, bool, int]] = {}

    def whole(self) -> tuple[str, bool]:
        """The text, and whether it can stand behind an operator without brackets."""
        return self._write(self.sequence)[:2]

    def _write(self, stretch: str) -> tuple[str, bool, int]:
        """Text, whether it needs no brackets, and how many of its groups begin with a channel mixer."""
        if stretch not in self.known:
            self.known[stretch] = self._shortest(stretch)
        return self.known[stretch]

    def _shortest(self, stretch: str) -> tuple[str, bool, int]:
        if len(stretch) == 1:
            return (*self.texts[ord(stretch)], 0)
        size = len(stretch)
        repeats = _repeats(stretch)
        # reached[j]: (characters, awkward groups, where the last term began, the last term) of the best first
        # j units.
        reached: list[tuple[int, int, int, str] | None] = [(-3, 0, 0, ""), *[None] * size]
        for begin in range(size):
            before = reached[begin]
            assert before is not None
            terms = [(1, self._term(stretch[begin]), 0)]
            terms += [
                self._repeat(stretch[begin : begin + period], count) for period, count in repeats[begin]
            ]
            for units, term, awkward in terms:
                reach = (before[0] + 3 + len(term), before[1] + awkward, begin, term)
                known = reached[begin + units]
                if known is None or reach[:2] < known[:2]:
                    reached[begin + units] = reach
        terms_back: list[str] = []
        place = size
        while place:
            step = reached[place]
            assert step is not None
            terms_back.append(step[3])
            place = step[2]
        last = reached[size]
        assert last is not None
        return " + ".join(reversed(terms_back)), False, last[1]

    def _term(self, symbol: str) -> str:
        """One unit as a term of a sum: only `|` binds more loosely than `+`."""
        text = self.texts[ord(symbol)][0]
        return f"({text})" if self.loose[ord(symbol)] else text

    def _repeat(self, body: str, count: int) -> tuple[int, str, int]:
        text, closed, awkward = self._write(body)
        term = f"{count} * {text if closed else f'({text})'}"
        return len(body) * count, term, awkward + (len(body) > 1 and self.channel[ord(body[0])])


def _repeats(stretch: str) -> list[list[tuple[int, int]]]:
    """For each place, the (period, count) of every repeat that begins there, its body not itself a repeat."""
    size = len(stretch)
    found: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    for period in range(1, min(size // 2, LONGEST_GROUP) + 1):
        begin = 0
        while begin + period < size:
            end = begin
            while end + period < size and stretch[end] == stretch[end + period]:
                end += 1
            for place in range(begin, end - period + 1):
                body = stretch[place : place + period]
                if (body + body).find(body, 1) == period:
                    most = (end + period - place) // period
                    # A very long repeat is taken whole, which keeps the search short.
                    found[place] += [
                        (period, count) for count in (range(2, most + 1) if most <= 32 else [most])
                    ]
            begin = end + 1
    return found
