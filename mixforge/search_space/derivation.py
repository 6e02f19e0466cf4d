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
from typing import Literal, NamedTuple

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import interpret
from mixforge.search_space.syntax import Expression

Kind = Literal["rule", "recursive", "choice", "copies", "copy"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision: its name, the texts of the options that were offered, and the index of the one taken."""

    name: str
    options: tuple[str, ...]
    index: int

    @property
    def taken(self) -> str:
        return self.options[self.index]


# A draw makes nodes by the hundred, and a named tuple is made three times as fast as a frozen dataclass.
class Node(NamedTuple):
    """A rule that was entered, a choice that was made, or copies that were drawn, with everything that was
    decided inside.

    Two nodes of one `symbol` grew from the same place of the grammar: what grew at one can grow at the
    other, with `scope` in the names inside it put in the place of the other's, as far as the bound on
    recursion offers it there.
    """

    kind: Kind
    """`recursive`: a rule that can come up again inside itself. `copies`: all copies of one `n ** body`, after
    what decided n; `copy`: one of them."""
    scope: str
    """The path of what is around the names inside this node (of this rule or copy itself, where it is one)."""
    label: str
    """The place inside the text around it; empty for the start and for what is the whole text of a rule or copy.
    """
    symbol: str
    choice: Choice | None
    """None for everything but a choice."""
    children: tuple[Node, ...]
    expression: Expression
    """What was spelled here."""

    @property
    def path(self) -> str:
        """The path of this node, from the start."""
        return self.scope if self.kind in ("rule", "recursive", "copy") else join(self.scope, self.label)

    @property
    def copies(self) -> tuple[Node, ...]:
        """The copies below a node of kind `copies`."""
        return tuple([child for child in self.children if child.kind == "copy"])

    def walk(self) -> Iterator[Node]:
        """This node, then all below it, in the order in which they were decided."""
        pending = [self]
        while pending:
            node = pending.pop()
            yield node
            pending += reversed(node.children)

    def inner(self) -> list[Node]:
        """The nearest nodes below that are of this node's own symbol."""
        found, pending = [], list(reversed(self.children))
        while pending:
            node = pending.pop()
            if node.symbol == self.symbol:
                found.append(node)
            else:
                pending += reversed(node.children)
        return found

    def choices(self) -> tuple[Choice, ...]:
        """The choices at and below this node."""
        return tuple([node.choice for node in self.walk() if node.choice is not None])


def join(scope: str, label: str) -> str:
    return f"{scope}/{label}" if scope and label else scope or label


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
