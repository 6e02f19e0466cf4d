"""Whether a grammar has a sentence for an architecture, and which: matching the flat stack against the
rules.

The stack is matched as a string is parsed: `(production, room, place)` is matched once and says at which
later places it can end. What makes one residual unit (a mixer's call, `|`, `beside`) is matched by listing
its sentences, so that aliases, defaults, shares and the order of branches count for what they mean and not
for how they are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.canonical import canonical_unit
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.notation import interpret, interpret_stack, vocabulary
from mixforge.search_space.production import Production, Sentence
from mixforge.search_space.productions import Applied, Copies, Enter, Fixed, Joined, Pick, whole
from mixforge.search_space.stack import Beside, Layer, Residual, Reuse, Segment, Unit
from mixforge.search_space.syntax import Apply, Expression, NotationError, Number, read

MOST_LISTED = 100_000
"""Sentences of one residual unit's text that are looked through."""

Answers = tuple[int, ...]
"""The indices with which the choices of one growth are answered, in the order in which they are asked."""

Units = tuple[Unit, ...]


def find(start: Enter, room: int, architecture: Architecture) -> Iterator[Answers]:
    """Answers whose sentence has the architecture's stack, unit by unit, in its model; at most two.

    A layer that owns a shared cache which no layer reads is the plain layer. The first growth found takes
    each owner as read, the second takes an owner for a plain layer where that fits: a sentence that only a
    mixture of both finds is missed. The caller checks what it gets. Raises ValueError where a unit has more
    than MOST_LISTED sentences.
    """
    for unread in (False, True):
        yield from _Search(architecture, unread).begin(start, room)


@dataclass(slots=True)
class _Listing:
    """The sentences of one unit's text, by what they mean; listed as far as was needed until now."""

    sentences: Iterator[Sentence]
    known: dict[Unit, Answers] = field(default_factory=dict)
    listed: int = 0


class _Search:
    """One architecture and what has been matched against it."""

    def __init__(self, architecture: Architecture, unread: bool) -> None:
        self.architecture = architecture
        self.width = architecture.width
        self.unread = unread
        self.listings: dict[tuple[Production, int], _Listing] = {}
        self.fixed: dict[Fixed, Units] = {}
        self.matched: dict[tuple[Production, int, Units, int], dict[int, Answers]] = {}

    def begin(self, production: Production, room: int) -> Iterator[Answers]:
        """Match what stands outside the stack: the way to lm(...), then its words."""
        match production:
            case Enter():
                yield from self.begin(production.rule.body, production.inside(room))
            case Pick():
                offer = production.offer(room)
                for index, option in enumerate(offer.options):
                    for answers in self.begin(option, room):
                        yield (index, *answers) if len(offer.options) > 1 else answers
            case Fixed():
                if isinstance(production.expression, Apply) and production.expression.function == "lm":
                    call = production.expression
                    parts = tuple((name, Fixed(value)) for name, value in call.keywords)
                    yield from self.model(tuple(map(Fixed, call.arguments)), parts, room)
            case Applied(function="lm"):
                yield from self.model(production.arguments, production.keywords, room)

    def model(
        self, arguments: tuple[Production, ...], keywords: tuple[tuple[str, Production], ...], room: int
    ) -> Iterator[Answers]:
        """Match lm(stack, ...)."""
        units = self.architecture.stack
        if len(arguments) != 1:
            return
        stack = self.ends(arguments[0], room, units, 0).get(len(units))
        if stack is None:
            return
        words = self.words(keywords, room)
        if words is not None:
            yield stack + words

    def words(self, keywords: tuple[tuple[str, Production], ...], room: int) -> Answers | None:
        """Answers with which the words of lm(...) are this architecture's."""
        tree = read(str(self.architecture))
        assert isinstance(tree, Apply)
        names = [name for name, _ in keywords]
        for values in product(*(list(value.sentences("", room)) for _, value in keywords)):
            given = tuple(zip(names, (expression for expression, _ in values), strict=True))
            try:
                if interpret(Apply("lm", tree.arguments, given)) == self.architecture:
                    return tuple(answer for value in values for answer in _answers(value))
            except NotationError:
                continue
        return None

    def ends(self, production: Production, room: int, units: Units, place: int) -> dict[int, Answers]:
        """Where sentences of the production that begin at this place of the units can end, and how they get
        there."""
        if place >= len(units):
            return {}
        key = (production, room, units, place)
        if key not in self.matched:
            found: dict[int, Answers] = {}
            for end, answers in self.match(production, room, units, place):
                found.setdefault(end, answers)
            self.matched[key] = found
        return self.matched[key]

    def match(
        self, production: Production, room: int, units: Units, place: int
    ) -> Iterator[tuple[int, Answers]]:
        """`ends`, not remembered. Where one end is given twice, the first way counts."""
        match production:
            case Enter():
                yield from self.ends(production.rule.body, production.inside(room), units, place).items()
            case Pick():
                offer = production.offer(room)
                for index, option in enumerate(offer.options):
                    asked = (index,) if len(offer.options) > 1 else ()
                    for end, answers in self.ends(option, room, units, place).items():
                        yield end, asked + answers
            case Fixed():
                yield from self.match_fixed(production, units, place)
            case Joined(symbol="+"):
                yield from self.match_sum([(term, room) for term in production.terms], units, place)
            case Joined(symbol="*"):
                yield from self.match_repeat(production, room, units, place)
            case Joined(symbol="@"):
                yield from self.match_reuse(production, room, units, place)
            case Copies():
                yield from self.match_copies(production, room, units, place)
            case _:
                listed = self.listed(production, room, units[place])
                if listed is not None:
                    yield place + 1, listed

    def match_fixed(self, production: Fixed, units: Units, place: int) -> Iterator[tuple[int, Answers]]:
        if production not in self.fixed:
            self.fixed[production] = self.meaning(production.expression)
        said = self.fixed[production]
        end = place + len(said)
        if said and end <= len(units) and all(map(self.same, said, units[place:end])):
            yield end, ()

    def match_sum(
        self, terms: list[tuple[Production, int]], units: Units, place: int
    ) -> Iterator[tuple[int, Answers]]:
        reached: dict[int, Answers] = {place: ()}
        for term, room in terms:
            reached = self.onward(reached, term, room, units)
        yield from reached.items()

    def onward(
        self, reached: dict[int, Answers], production: Production, room: int, units: Units
    ) -> dict[int, Answers]:
        """The ends of a production that begins at any of the places reached."""
        further: dict[int, Answers] = {}
        for place, before in reached.items():
            for end, answers in self.ends(production, room, units, place).items():
                further.setdefault(end, before + answers)
        return further

    def match_repeat(
        self, production: Joined, room: int, units: Units, place: int
    ) -> Iterator[tuple[int, Answers]]:
        ends = self.ends(production.terms[-1], room, units, place)
        for times, before in self.numbers(production, room):
            for end, answers in ends.items():
                last = place + times * (end - place)
                if units[place:last] == times * units[place:end]:
                    yield last, before + answers

    def match_reuse(
        self, production: Joined, room: int, units: Units, place: int
    ) -> Iterator[tuple[int, Answers]]:
        body, unit = production.terms[-1], units[place]
        for times, before in self.numbers(production, room):
            if times == 1:
                for end, once in self.ends(body, room, units, place).items():
                    yield end, before + once
            elif isinstance(unit, Reuse) and unit.is_plain and unit.times % times == 0:
                # n @ (m @ a) is n*m @ a, so the body may be the inner reuse.
                rest = unit.times // times
                inside = unit.body if rest == 1 else (Reuse(rest, unit.body),)
                whole_body = self.ends(body, room, inside, 0).get(len(inside))
                if whole_body is not None:
                    yield place + 1, before + whole_body

    def match_copies(
        self, production: Copies, room: int, units: Units, place: int
    ) -> Iterator[tuple[int, Answers]]:
        wanted: dict[int, Answers] = {}
        for sentence in production.times.sentences("", room):
            wanted.setdefault(whole(sentence[0]), _answers(sentence))
        reached: dict[int, Answers] = {place: ()}
        for times in range(1, max(wanted) + 1):
            reached = self.onward(reached, production.body, room, units)
            if times in wanted:
                for end, answers in reached.items():
                    yield end, wanted[times] + answers
            if not reached:
                return

    def numbers(self, production: Joined, room: int) -> Iterator[tuple[int, Answers]]:
        """What the factors before the last term can come to."""
        for values in product(*(list(term.sentences("", room)) for term in production.terms[:-1])):
            times = 1
            for expression, _ in values:
                factor = expression.value if isinstance(expression, Number) else 0
                times *= factor if isinstance(factor, int) else 0
            if times >= 1:
                yield times, tuple(answer for value in values for answer in _answers(value))

    def listed(self, production: Production, room: int, unit: Unit) -> Answers | None:
        """Answers with which a unit's text means this unit, from its listed sentences."""
        if not _can_be(production, unit):
            return None
        key = (production, room)
        listing = self.listings.setdefault(key, _Listing(production.sentences("", room)))
        while unit not in listing.known:
            sentence = next(listing.sentences, None)
            if sentence is None:
                return None
            listing.listed += 1
            if listing.listed > MOST_LISTED:
                raise ValueError(
                    f"one layer of this space has more than {MOST_LISTED} sentences, "
                    "which are too many to look through"
                )
            for meant in self.readings(self.meaning(sentence[0])):
                listing.known.setdefault(meant, _answers(sentence))
        return listing.known[unit]

    def meaning(self, expression: Expression) -> Units:
        """The canonical units of a part of a stack; none where it means nothing."""
        try:
            return tuple(
                each
                for unit in interpret_stack(expression)
                for each in canonical_unit(unit, self.width, self.architecture.place)
            )
        except NotationError:
            return ()

    def same(self, said: Unit, unit: Unit) -> bool:
        return unit in self.readings((said,))

    def readings(self, units: Units) -> Units:
        """What a text of one unit can stand for: itself and, in the second search, its form that nobody
        reads."""
        if not self.unread or len(units) != 1:
            return units if len(units) == 1 else ()
        plain = _unread(units[0], self.width)
        return (*units, *canonical_unit(plain, self.width, self.architecture.place))


def _can_be(production: Production, unit: Unit) -> bool:
    """False where a call of one mixer is held against another, or mixers beside one another against a layer:
    genes never make one the other."""
    match production:
        case Applied(function="beside") | Joined(symbol="|"):
            return isinstance(unit, Beside)
        case Applied() if production.function in vocabulary():
            return isinstance(unit, Layer) and isinstance(unit.mixer, vocabulary()[production.function][0])
    return True


def _unread(unit: Unit, width: int) -> Unit:
    def plain(mixer: Mixer) -> Mixer:
        return mixer.unread(frozenset(mixer.lends(width)))

    match unit:
        case Layer():
            return Layer(plain(unit.mixer))
        case Beside():
            return replace(unit, branches=tuple(map(plain, unit.branches)))
        case Reuse() | Segment() | Residual():
            return replace(unit, body=tuple(_unread(each, width) for each in unit.body))


def _answers(sentence: Sentence) -> Answers:
    return tuple(choice.index for node in sentence[1] for choice in node.choices())
