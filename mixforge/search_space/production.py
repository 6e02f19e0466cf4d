"""What every form of a right-hand side can do: be grown, counted, listed and measured.

`room` is how many more recursive rules may be entered below this point. A form whose shortest sentence needs
more is not offered, so every growth ends. Room depends on the path alone, so a choice of one name always has
one set of options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Overgrown


def join(scope: str, label: str) -> str:
    return f"{scope}/{label}" if scope and label else scope or label


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


def combinations(
    places: Sequence[tuple[Production, str]], room: int
) -> Iterator[tuple[list[Expression], tuple[Node, ...]]]:
    """Every combination of the sentences of several productions. A loop: there may be a thousand places."""
    running: list[Iterator[Sentence]] = []
    taken: list[Sentence] = []
    while True:
        if len(taken) == len(places):
            nodes = tuple(node for _, below in taken for node in below)
            yield [expression for expression, _ in taken], nodes
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
