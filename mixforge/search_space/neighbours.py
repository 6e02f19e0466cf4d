"""The derivations that are one choice away from a derivation, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mixforge.search_space.derivation import Choice, Derivation
from mixforge.search_space.grammar import Space
from mixforge.search_space.mutation import Variation


def neighbours(space: Space, derivation: Derivation, *, every: bool = False) -> Iterator[Variation]:
    """Each choice in turn takes each of its other options; everything else stays as far as it is still offered.

    What an option asks that was not asked before takes the first of its options, or with `every` all combinations
    of them, which may be very many. Lazily, in the order of the choices. Their `distance` from the derivation is one,
    and where the option asks or leaves out other choices, at most one for each of those more.
    """
    for choice in derivation.choices:
        for index in range(len(choice.options)):
            if index != choice.index:
                for neighbour in _changed(space, derivation, choice, index, every):
                    yield Variation(derivation=neighbour, operator="gene", place=choice.name)


def _changed(
    space: Space, derivation: Derivation, choice: Choice, index: int, every: bool
) -> Iterator[Derivation]:
    picks = {**derivation.picks, choice.name: choice.options[index]}
    answers = _Answers()
    while True:
        yield space.replay(picks, answers.choose, derivation)
        if not every or not answers.advance():
            return


@dataclass(slots=True)
class _Answers:
    """Answers to what a sentence asks: all combinations in order, the last answer changing first."""

    taken: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)

    def choose(self, name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
        self.offered.append(len(options))
        if len(self.offered) > len(self.taken):
            self.taken.append(0)
        return self.taken[len(self.offered) - 1]

    def advance(self) -> bool:
        """On to the next combination; False after the last. What comes behind a changed answer is asked anew."""
        while self.taken and self.taken[-1] == self.offered[len(self.taken) - 1] - 1:
            self.taken.pop()
        self.offered.clear()
        if not self.taken:
            return False
        self.taken[-1] += 1
        return True
