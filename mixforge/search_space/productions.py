"""The forms of a right-hand side: fixed text, chains of operators, calls, choices, rules, independent
copies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from mixforge.search_space.derivation import Choice, Kind, Node, join
from mixforge.search_space.production import (
    MOST_DECISIONS,
    Growth,
    Production,
    Sentence,
    answers_of_all,
    combinations,
    countable,
    power,
    separate,
    ways_of_all,
)
from mixforge.search_space.syntax import Apply, Expression, Number, Operation, Symbol


@dataclass(eq=False)
class Fixed(Production):
    """Text in which nothing is left to decide."""

    expression: Expression

    @property
    def parts(self) -> Sequence[Production]:
        return ()

    def measure(self) -> float:
        return 0

    def grow(self, scope: str, room: int, growth: Growth, nodes: list[Node]) -> Expression:
        return self.expression

    def count(self, room: int) -> int:
        return 1

    def answers(self, number: int, room: int) -> Iterator[int]:
        yield from ()

    def longest(self, room: int) -> int:
        return 0

    def sentences(self, scope: str, room: int) -> Iterator[Sentence]:
        yield self.expression, ()


@dataclass(eq=False)
class Joined(Production):
    """A chain of one operator, grouped to the left: `a + b + c`, `any(1, 2) * a`."""

    symbol: Symbol
    terms: tuple[Production, ...]

    @property
    def parts(self) -> Sequence[Production]:
        return self.terms

    def measure(self) -> float:
        return max(term.height for term in self.terms)

    def grow(self, scope: str, room: int, growth: Growth, nodes: list[Node]) -> Expression:
        return joined(self.symbol, [term.grow(scope, room, growth, nodes) for term in self.terms])

    def count(self, room: int) -> int:
        return ways_of_all(self.terms, room)

    def answers(self, number: int, room: int) -> Iterator[int]:
        return answers_of_all(self.terms, number, room)

    def longest(self, room: int) -> int:
        return sum(term.longest(room) for term in self.terms)

    def sentences(self, scope: str, room: int) -> Iterator[Sentence]:
        for values, nodes in combinations([(term, scope) for term in self.terms], room):
            yield joined(self.symbol, values), nodes


@dataclass(eq=False)
class Applied(Production):
    """A call whose arguments hold something to decide."""

    function: str
    arguments: tuple[Production, ...]
    keywords: tuple[tuple[str, Production], ...]

    @property
    def parts(self) -> Sequence[Production]:
        return (*self.arguments, *(value for _, value in self.keywords))

    def measure(self) -> float:
        return max(part.height for part in self.parts)

    def grow(self, scope: str, room: int, growth: Growth, nodes: list[Node]) -> Expression:
        return self.spelled([part.grow(scope, room, growth, nodes) for part in self.parts])

    def count(self, room: int) -> int:
        return ways_of_all(self.parts, room)

    def answers(self, number: int, room: int) -> Iterator[int]:
        return answers_of_all(self.parts, number, room)

    def longest(self, room: int) -> int:
        return sum(part.longest(room) for part in self.parts)

    def sentences(self, scope: str, room: int) -> Iterator[Sentence]:
        for values, nodes in combinations([(part, scope) for part in self.parts], room):
            yield self.spelled(values), nodes

    def spelled(self, values: Sequence[Expression]) -> Apply:
        """The call with these values for its parts."""
        split = len(self.arguments)
        names = (name for name, _ in self.keywords)
        return Apply(self.function, tuple(values[:split]), tuple(zip(names, values[split:], strict=True)))


@dataclass(frozen=True, slots=True)
class Offer:
    """The options of a choice that fit into some room."""

    options: tuple[Production, ...]
    texts: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(eq=False)
class Pick(Production):
    """`any(...)`. Where only one option fits there is nothing to decide, and no choice is recorded."""

    label: str
    symbol: str
    everything: Offer
    tallest: float = math.inf
    _tight: dict[int, Offer] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)

    @property
    def parts(self) -> Sequence[Production]:
        return self.everything.options

    def measure(self) -> float:
        heights = [option.height for option in self.everything.options]
        self.tallest = max(heights)
        return min(heights)

    def offer(self, room: int) -> Offer:
        """The options whose shortest sentence fits into the room."""
        if room >= self.tallest:
            return self.everything
        if room not in self._tight:
            every = self.everything
            fits = [place for place, option in enumerate(every.options) if option.height <= room]
            self._tight[room] = Offer(
                tuple(every.options[place] for place in fits),
                tuple(every.texts[place] for place in fits),
                tuple(every.weights[place] for place in fits),
            )
        return self._tight[room]

    def grow(self, scope: str, room: int, growth: Growth, nodes: list[Node]) -> Expression:
        offer = self.offer(room)
        if len(offer.options) == 1:
            return offer.options[0].grow(scope, room, growth, nodes)
        growth.spend()
        name = join(scope, self.label)
        index = growth.choose(name, offer.texts, offer.weights)
        below: list[Node] = []
        expression = offer.options[index].grow(scope, room, growth, below)
        choice = Choice(name, offer.texts, index)
        nodes.append(Node("choice", scope, self.label, self.symbol, choice, tuple(below), expression))
        return expression

    def count(self, room: int) -> int:
        if room not in self._counts:
            self._counts[room] = countable(sum(option.count(room) for option in self.offer(room).options))
        return self._counts[room]

    def answers(self, number: int, room: int) -> Iterator[int]:
        options = self.offer(room).options
        for index, option in enumerate(options):
            ways = option.count(room)
            if number < ways:
                if len(options) > 1:
                    yield index
                yield from option.answers(number, room)
                return
            number -= ways
        raise AssertionError("a sentence's number is below the count")

    def longest(self, room: int) -> int:
        return 1 + max(option.longest(room) for option in self.offer(room).options)

    def sentences(self, scope: str, room: int) -> Iterator[Sentence]:
        offer = self.offer(room)
        name = join(scope, self.label)
        for index, option in enumerate(offer.options):
            for expression, below in option.sentences(scope, room):
                if len(offer.options) == 1:
                    yield expression, below
                    continue
                choice = Choice(name, offer.texts, index)
                node = Node("choice", scope, self.label, self.symbol, choice, below, expression)
                yield expression, (node,)


@dataclass(eq=False)
class Rule:
    """A named right-hand side. `recursive`: it can come up again inside itself."""

    name: str
    body: Production
    recursive: bool = False
    height: float = math.inf
    _counts: dict[int, int] = field(default_factory=dict)
    _lengths: dict[int, int] = field(default_factory=dict)

    def count(self, room: int) -> int:
        if room not in self._counts:
            self._counts[room] = self.body.count(room)
        return self._counts[room]

    def longest(self, room: int) -> int:
        if room not in self._lengths:
            self._lengths[room] = 1 + self.body.longest(room)
        return self._lengths[room]


@dataclass(eq=False)
class Enter(Production):
    """A rule's name."""

    label: str
    rule: Rule

    @property
    def parts(self) -> Sequence[Production]:
        return ()

    @property
    def kind(self) -> Kind:
        return "recursive" if self.rule.recursive else "rule"

    def measure(self) -> float:
        return self.rule.height

    def inside(self, room: int) -> int:
        """The room that is left within the rule."""
        return room - 1 if self.rule.recursive else room

    def grow(self, scope: str, room: int, growth: Growth, nodes: list[Node]) -> Expression:
        path = join(scope, self.label)
        if growth.kept and (kept := growth.keep(path, self.rule.name, nodes)) is not None:
            return kept
        growth.spend()
        below: list[Node] = []
        expression = self.rule.body.grow(path, self.inside(room), growth, below)
        nodes.append(Node(self.kind, path, self.label, self.rule.name, None, tuple(below), expression))
        return expression

    def count(self, room: int) -> int:
        return self.rule.count(self.inside(room))

    def answers(self, number: int, room: int) -> Iterator[int]:
        return self.rule.body.answers(number, self.inside(room))

    def longest(self, room: int) -> int:
        return self.rule.longest(self.inside(room))

    def sentences(self, scope: str, room: int) -> Iterator[Sentence]:
        path = join(scope, self.label)
        for expression, below in self.rule.body.sentences(path, self.inside(room)):
            yield expression, (Node(self.kind, path, self.label, self.rule.name, None, below, expression),)


@dataclass(eq=False)
class Copies(Production):
    """`n ** body`: the body drawn n times, each time anew, and added up."""

    label: str
    symbol: str
    times: Production
    body: Production

    @property
    def parts(self) -> Sequence[Production]:
        return (self.times, self.body)

    def measure(self) -> float:
        return max(self.times.height, self.body.height)

    @property
    def inside(self) -> str:
        """The symbol of one copy."""
        return f"{self.symbol}[]"

    def scope(self, scope: str, index: int) -> str:
        return join(scope, f"{self.label}[{index}]")

    def grow(self, scope: str, room: int, growth: Growth, nodes: list[Node]) -> Expression:
        below: list[Node] = []
        drawn: list[Expression] = []
        for index in range(whole(self.times.grow(scope, room, growth, below))):
            path = self.scope(scope, index)
            if growth.kept and (kept := growth.keep(path, self.inside, below)) is not None:
                drawn.append(kept)
                continue
            growth.spend()
            inside: list[Node] = []
            drawn.append(self.body.grow(path, room, growth, inside))
            below.append(self.copy(path, drawn[-1], tuple(inside)))
        expression = joined("+", drawn)
        nodes.append(self.node(scope, expression, tuple(below)))
        return expression

    def copy(self, path: str, expression: Expression, inside: tuple[Node, ...]) -> Node:
        return Node("copy", path, "", self.inside, None, inside, expression)

    def node(self, scope: str, expression: Expression, below: tuple[Node, ...]) -> Node:
        return Node("copies", scope, self.label, self.symbol, None, below, expression)

    def numbers(self, room: int) -> list[int]:
        """What `times` can say, once for each way to say it. Raises ValueError unless all are whole, from 1
        up."""
        found = list(islice(self.times.sentences("", room), 10_001))
        if len(found) > 10_000:
            raise ValueError("'n **' has more than 10000 ways to say n; write its values in one any(...)")
        return [whole(expression) for expression, _ in found]

    def count(self, room: int) -> int:
        ways = self.body.count(room)
        return countable(sum(power(ways, times) for times in self.numbers(room)))

    def answers(self, number: int, room: int) -> Iterator[int]:
        ways = self.body.count(room)
        for which, times in enumerate(self.numbers(room)):
            total = power(ways, times)
            if number < total:
                yield from self.times.answers(which, room)
                yield from answers_of_all([self.body] * times, number, room)
                return
            number -= total
        raise AssertionError("a sentence's number is below the count")

    def longest(self, room: int) -> int:
        return self.times.longest(room) + max(self.numbers(room)) * (1 + self.body.longest(room))

    def sentences(self, scope: str, room: int) -> Iterator[Sentence]:
        for times, first in self.times.sentences(scope, room):
            paths = [self.scope(scope, index) for index in range(whole(times))]
            for drawn, parts in separate([(self.body, path) for path in paths], room):
                copies = tuple(map(self.copy, paths, drawn, parts))
                expression = joined("+", drawn)
                yield expression, (self.node(scope, expression, first + copies),)


def joined(symbol: Symbol, terms: Sequence[Expression]) -> Expression:
    """The terms with the operator between them, grouped to the left; numbers are reckoned as `read` does
    it."""
    total = terms[0]
    for term in terms[1:]:
        if isinstance(total, Number) and isinstance(term, Number) and symbol in ("+", "*"):
            total = Number(total.value + term.value if symbol == "+" else total.value * term.value)
        else:
            total = Operation(symbol, total, term)
    return total


def whole(expression: Expression) -> int:
    """The number before `**`."""
    value = expression.value if isinstance(expression, Number) else None
    if not isinstance(value, int) or not 1 <= value <= MOST_DECISIONS:
        raise ValueError(
            f"'{expression} **' is no number of copies; "
            f"write a whole number from 1 to {MOST_DECISIONS} before '**'"
        )
    return value
