"""How far apart two derivations of one space are: the edit distance of their aligned trees of choices.

One edit changes a choice, adds one or takes one away. Choices at one place are compared with one another. Copies
of `n ** body` are aligned as sequences, and so are the turns of a rule that comes up again inside itself, so
that one layer more in front costs that layer and not every layer behind it:

    d(a, b) = choices that differ or that only one has, outside of sequences + sum over sequences of their edit
              distance, in which a change costs d(item, item) and an item more or less its number of choices

It is a metric: symmetric, zero for equal picks alone, and within the triangle inequality, since an edit distance
over a metric is one. Where a turn has several turns inside itself, the first goes on with the sequence and the
others are sequences of their own within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mixforge.search_space.alignment import edit_cost
from mixforge.search_space.derivation import Derivation, Node


def distance(first: Derivation, second: Derivation) -> int:
    """Edits that make one derivation the other. Both must be of one space, or the figure means nothing."""
    items = Items()
    return int(items.between(items.of(whole(first)), items.of(whole(second))))


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A part of a derivation that is compared as one: a copy, or a rule without its next turn inside it."""

    node: Node
    nodes: tuple[Node, ...]
    scope: str
    holes: frozenset[int] = frozenset()
    """`id` of the nodes below that do not belong to it."""

    def parts(self) -> tuple[dict[str, Node], dict[str, list[Turn]]]:
        """Its choices by their names within it, and its sequences by their paths within it."""
        skip = len(self.scope) + 1 if self.scope else 0
        choices: dict[str, Node] = {}
        sequences: dict[str, list[Turn]] = {}
        pending = list(reversed(self.nodes))
        while pending:
            node = pending.pop()
            if id(node) in self.holes:
                continue
            if node.choice is not None:
                choices[node.choice.name[skip:]] = node
            if node.kind == "recursive":
                sequences[node.path[skip:]] = list(self.turns(node))
            elif node.kind == "copies":
                sequences[node.path[skip:]] = [
                    Turn(copy, copy.children, copy.scope, self.holes) for copy in node.copies
                ]
                pending += [child for child in reversed(node.children) if child.kind != "copy"]
            else:
                pending += reversed(node.children)
        return choices, sequences

    def turns(self, node: Node) -> Iterator[Turn]:
        """A recursive rule and its turns inside one another: the next is the first of its symbol inside."""
        holes = self.holes
        while True:
            inner = [each for each in node.inner() if id(each) not in holes] if node.children else []
            if not inner:
                yield Turn(node, node.children, node.scope, holes)
                return
            yield Turn(node, node.children, node.scope, holes | {id(inner[0])})
            node = inner[0]


def whole(derivation: Derivation) -> Turn:
    """All of a derivation."""
    return Turn(derivation.root, (derivation.root,), "")


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A turn's content. Items of one `Items` that are alike are one object."""

    names: frozenset[str]
    picks: frozenset[tuple[str, str]]
    sequences: dict[str, tuple[Item, ...]]
    size: int
    """Choices in it, those in its sequences counted."""


@dataclass(slots=True)
class Items:
    """The items of a comparison, and the distances between them that are known."""

    known: dict[object, Item] = field(default_factory=dict)
    distances: dict[tuple[int, int], float] = field(default_factory=dict)

    def of(self, turn: Turn) -> Item:
        choices, found = turn.parts()
        picks = frozenset([(name, node.choice.taken) for name, node in choices.items() if node.choice])
        sequences = {path: tuple(map(self.of, turns)) for path, turns in found.items()}
        key = (picks, tuple([(path, tuple(map(id, items))) for path, items in sequences.items()]))
        if key not in self.known:
            size = len(picks) + sum(item.size for items in sequences.values() for item in items)
            self.known[key] = Item(frozenset(choices), picks, sequences, size)
        return self.known[key]

    def between(self, first: Item, second: Item) -> float:
        if first is second:
            return 0
        key = (id(first), id(second))
        known = self.distances.get(key)
        if known is None:
            known = len(first.names | second.names) - len(first.picks & second.picks)
            for path in first.sequences.keys() | second.sequences.keys():
                mine, yours = first.sequences.get(path, ()), second.sequences.get(path, ())
                known += edit_cost(mine, yours, self.between, _size)
            self.distances[key] = self.distances[key[1], key[0]] = known
        return known


def _size(item: Item) -> float:
    return item.size
