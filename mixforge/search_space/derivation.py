"""A derivation: the tree of decisions that leads from a space's start to one sentence.

A decision is named by its path, `stack/group[1]/recurrent/linear.decay`: the rules that were entered on the
way, `[i]` for the i-th independent draw of `n ** rule`, then the place inside the rule's text. Two draws
that pass the same place have the same name and are offered the same options there; a rule entered in two
places has two names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import interpret
from mixforge.search_space.syntax import Expression


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision: its name, the texts of the options that were offered, and the index of the one taken."""

    name: str
    options: tuple[str, ...]
    index: int

    @property
    def taken(self) -> str:
        return self.options[self.index]


@dataclass(frozen=True, slots=True)
class Node:
    """A rule that was entered, or a choice that was made, with everything that was decided inside it.

    Two nodes of one `symbol` grew from the same place of the grammar: what grew at one can grow at the
    other, with `scope` in the names inside it put in the place of the other's, as far as the bound on
    recursion offers it there.
    """

    scope: str
    """The path of the rule around this node (of this rule itself, where the node is a rule)."""
    label: str
    """The place inside that rule's text; empty for a rule, and for a choice that is the rule's whole
    text."""
    symbol: str
    choice: Choice | None
    """None for a rule."""
    children: tuple[Node, ...]

    def walk(self) -> Iterator[Node]:
        """This node, then all below it, in the order in which they were decided."""
        yield self
        for child in self.children:
            yield from child.walk()

    def choices(self) -> tuple[Choice, ...]:
        """The choices at and below this node."""
        return tuple(node.choice for node in self.walk() if node.choice is not None)


@dataclass(frozen=True)
class Derivation:
    """The decisions, as a tree under the start, and the sentence that they spell."""

    root: Node
    expression: Expression
    """The sentence: no `any`, no rule and no `**` is left in it."""

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Every choice, in the order in which it was made. No name occurs twice."""
        return self.root.choices()

    @cached_property
    def picks(self) -> dict[str, str]:
        """Name to the text of the option taken: all that `Space.replay` needs to make this derivation
        again."""
        return {choice.name: choice.taken for choice in self.choices}

    @cached_property
    def architecture(self) -> Architecture:
        """What the sentence means. Raises ValueError where it means nothing that can be built."""
        return interpret(self.expression)
