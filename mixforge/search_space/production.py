"""What every form of a right-hand side can do: be grown, counted, listed and measured.

`room` is how many more recursive rules may be entered below this point. A form whose shortest sentence needs
more is not offered, so every growth ends. Room depends on the path alone, so a choice of one name always has
one set of options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mixforge.search_space.derivation import Node
from mixforge.search_space.syntax import Expression

Choose = Callable[[str, tuple[str, ...], tuple[float, ...]], int]
"""(name, texts of the options, their weights) -> the index of the option to take."""

Sentence = tuple[Expression, tuple[Node, ...]]
"""What was spelled, and what was decided on the way."""

MOST_DECISIONS = 4_096
"""Rules entered, choices made and copies drawn in one sentence."""

MOST_DIGITS = 1_000_000
"""Binary digits of a count."""


class Overgrown(ValueError):
    """A sentence that was given up because it grew past MOST_DECISIONS."""

    def __init__(self) -> None:
        super().__init__(
            f"the sentence takes more than {MOST_DECISIONS} decisions or nests too deeply; "
            "give the options that end more weight, or lower space.recursion"
        )


@dataclass(slots=True)
class Growth:
    """Who answers the choices of one sentence, and how many decisions it may still take."""

    choose: Choose
    left: int = MOST_DECISIONS
    kept: Mapping[str, Node] = field(default_factory=dict)
    """Rules and copies of another derivation that would grow the same way again, by their paths."""

    def spend(self, decisions: int = 1) -> None:
        self.left -= decisions
        if self.left < 0:
            raise Overgrown

    def keep(self, path: str, symbol: str, nodes: list[Node]) -> Expression | None:
        """What another derivation has here, appended to `nodes`; None where it has to be grown."""
        node = self.kept.get(path)
        if node is None or node.symbol != symbol:
            return None
        self.spend(sum(1 for _ in node.walk()))
        nodes.append(node)
        return node.expression


class Production(ABC):
    """One form of a right-hand side."""

    height: float = 0
    """The room that the shortest sentence needs; infinite until shown to end."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Production]:
        """The productions inside this one's text (not those of the rules that it names)."""

    @abstractmethod
    def measure(self) -> float:
        """`height`, from the heights of what it is made of."""

    @abstractmethod
    def grow(self, scope: str, room: int, growth: Growth, nodes: list[Node]) -> Expression:
        """One sentence; what was decided is appended to `nodes`."""

    @abstractmethod
    def count(self, room: int) -> int:
        """How many ways there are to grow."""

    @abstractmethod
    def answers(self, number: int, room: int) -> Iterator[int]:
        """The indices that the choices of sentence `number` take, in the order in which they are asked; sentences
        are numbered as `sentences` lists them, from 0 to `count` - 1."""

    @abstractmethod
    def longest(self, room: int) -> int:
        """The most decisions that one sentence takes."""

    @abstractmethod
    def sentences(self, scope: str, room: int) -> Iterator[Sentence]:
        """Every way to grow, in the order of the text, the last decision changing first."""


def power(ways: int, times: int) -> int:
    if ways.bit_length() * times > MOST_DIGITS:
        raise ValueError(f"the space has more sentences than a number of {MOST_DIGITS} binary digits can say")
    total: int = ways**times
    return total


def countable(ways: int) -> int:
    if ways.bit_length() > MOST_DIGITS:
        raise ValueError(f"the space has more sentences than a number of {MOST_DIGITS} binary digits can say")
    return ways


def ways_of_all(parts: Sequence[Production], room: int) -> int:
    """How many ways there are to grow all the parts."""
    ways = 1
    for part in parts:
        ways = countable(ways * part.count(room))
    return ways


def answers_of_all(parts: Sequence[Production], number: int, room: int) -> Iterator[int]:
    """`answers` for sentence `number` of several productions in a row, the last of which changes first."""
    counts = [part.count(room) for part in parts]
    digits: list[int] = []
    for count in reversed(counts):
        number, digit = divmod(number, count)
        digits.append(digit)
    for part, digit in zip(parts, reversed(digits), strict=True):
        yield from part.answers(digit, room)


def combinations(
    places: Sequence[tuple[Production, str]], room: int
) -> Iterator[tuple[list[Expression], tuple[Node, ...]]]:
    """Every combination of the sentences of several productions, with all that was decided in them."""
    for expressions, nodes in separate(places, room):
        yield expressions, tuple(node for below in nodes for node in below)


def separate(
    places: Sequence[tuple[Production, str]], room: int
) -> Iterator[tuple[list[Expression], list[tuple[Node, ...]]]]:
    """`combinations`, with what was decided in each. A loop: there may be a thousand places."""
    running: list[Iterator[Sentence]] = []
    taken: list[Sentence] = []
    while True:
        if len(taken) == len(places):
            yield [expression for expression, _ in taken], [below for _, below in taken]
        else:
            production, scope = places[len(taken)]
            running.append(production.sentences(scope, room))
        # The last place moves on; a place that is through lets the one before it move on.
        while running:
            del taken[len(running) - 1 :]
            sentence = next(running[-1], None)
            if sentence is not None:
                taken.append(sentence)
                break
            running.pop()
        if not running:
            return
