"""New sentences from old ones: mutation and crossover of derivations.

    regrow   what was decided below one node is drawn anew
    swap     two subtrees of one symbol within the derivation change places
    insert   one more item: copies of `n ** body`, or one more turn of a rule inside itself
    delete   one item fewer
    gene     one choice takes another option; everything else stays as far as it is still offered
    cross    a subtree comes from another derivation of the space, from a node of the same symbol

Each takes a derivation of a space and gives another sentence of the same space, or None where there is no place
for it. Whether the sentence is legal and within the limits is asked by `Space.admit`, as for a draw. What the new
sentence asks and the old one did not answer is drawn by the options' weights. An operator raises Overgrown where that
takes too many decisions; `mutate` and `cross` pass on to another place.

Sources: Koza 1992, Genetic Programming, chapter 6 (subtree crossover and mutation); Whigham 1995, Grammatically-based
genetic programming (nodes of one symbol are exchanged). `insert` and `delete` on recursive rules are the
insertion and deletion of tree-adjoining derivations (Hoai, McKay and Abbass 2003).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mixforge.search_space.derivation import Choice, Derivation, Node, join
from mixforge.search_space.grammar import Space, weighted
from mixforge.search_space.production import Overgrown

Operator = Literal["regrow", "swap", "insert", "delete", "gene", "cross"]
_TRIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """A derivation that was made from another one, and how."""

    derivation: Derivation
    operator: Operator
    place: str
    """The path that was changed; for `swap` both, with `and` between them; for `cross` the path in the first
    parent, then `from` and the path in the second, where they differ. Empty for the whole sentence."""


def mutate(
    space: Space, parent: Derivation, rng: random.Random, operators: Sequence[Operator] = ()
) -> Variation:
    """A sentence that differs from its parent, by one of these operators (all but `cross` if none is named).

    Each is as likely as any other that has a place here. Raises ValueError where none of them has one.
    """
    chosen = operators or tuple(MUTATIONS)
    for operator in chosen:
        if operator not in MUTATIONS:
            raise ValueError(f"operator {operator!r} is no mutation; there are {', '.join(MUTATIONS)}")
    for operator in rng.sample(chosen, len(chosen)):
        try:
            found = MUTATIONS[operator](space, parent, rng)
        except Overgrown:
            continue
        if found is not None:
            return found
    raise ValueError(
        f"no place of this sentence takes {' or '.join(chosen)}; "
        + ("the space has one sentence" if not parent.choices else f"use others of {', '.join(MUTATIONS)}")
    )


def regrow(space: Space, parent: Derivation, rng: random.Random) -> Variation | None:
    """One node, each as likely as any other, drawn anew with everything below it."""
    nodes = [node for node in parent.root.walk() if node is not parent.root]
    for _ in range(_TRIES if nodes else 0):
        node = rng.choice(nodes)
        picks = _without(parent.picks, node.choices())
        child = space.replay(picks, weighted(rng), parent)
        if child.picks != parent.picks:
            return Variation(derivation=child, operator="regrow", place=node.path)
    return None


def gene(space: Space, parent: Derivation, rng: random.Random) -> Variation | None:
    """One choice, each as likely as any other, takes another of its options, by their weights."""
    if not parent.choices:
        return None
    changed = rng.choice(parent.choices)
    others = weighted(rng)

    def choose(name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
        if name != changed.name:
            return others(name, options, weights)
        left = [0.0 if index == changed.index else weight for index, weight in enumerate(weights)]
        return others(name, options, tuple(left))

    picks = _without(parent.picks, (changed,))
    return Variation(derivation=space.replay(picks, choose, parent), operator="gene", place=changed.name)


def swap(space: Space, parent: Derivation, rng: random.Random) -> Variation | None:
    """Two nodes of one symbol, neither within the other and not alike, change places."""
    kin: dict[str, list[Node]] = defaultdict(list)
    for node in parent.root.walk():
        kin[node.symbol].append(node)
    several = [node for nodes in kin.values() if len(nodes) > 1 for node in nodes]
    for _ in range(_TRIES if several else 0):
        first = rng.choice(several)
        second = rng.choice(kin[first.symbol])
        if first.expression == second.expression or _nested(first, second):
            continue
        picks = _without(parent.picks, (*first.choices(), *second.choices()))
        picks |= moved(first, second.scope) | moved(second, first.scope)
        child = space.replay(picks, weighted(rng), parent)
        if child.picks != parent.picks:
            place = f"{first.path} and {second.path}"
            return Variation(derivation=child, operator="swap", place=place)
    return None


def insert(space: Space, parent: Derivation, rng: random.Random) -> Variation | None:
    """One more item: copies up to the next larger number that is offered, or one more turn of a recursive rule.

    Half of the items are twins of one that is there, half are drawn.
    """
    for node in _places(parent, rng):
        grown = _more_copies(node, rng) if node.kind == "copies" else _one_more_turn(space, parent, node, rng)
        if grown is not None:
            return _replaced(space, parent, node, grown, rng, "insert")
    return None


def delete(space: Space, parent: Derivation, rng: random.Random) -> Variation | None:
    """One item fewer: copies down to the next smaller number that is offered, or one turn of a recursive rule."""
    for node in _places(parent, rng):
        if node.kind == "copies":
            left = _fewer_copies(node, rng)
        else:
            inner = node.inner()
            left = moved(rng.choice(inner), node.scope) if inner else None
        if left is not None:
            return _replaced(space, parent, node, left, rng, "delete")
    return None


MUTATIONS: dict[Operator, Callable[[Space, Derivation, random.Random], Variation | None]] = {
    "regrow": regrow,
    "swap": swap,
    "insert": insert,
    "delete": delete,
    "gene": gene,
}


def cross(
    space: Space, first: Derivation, second: Derivation, rng: random.Random
) -> tuple[Variation, Variation] | None:
    """Two children: an aligned pair of subtrees, that is of one symbol, changes places between the parents.

    Pairs on the same path come first in half of the cases, so that both parents' stacks stay in order. None
    where no pair of subtrees differs. Both parents must be derivations of the space.
    """
    kin: dict[str, list[Node]] = defaultdict(list)
    for node in second.root.walk():
        kin[node.symbol].append(node)
    nodes = [node for node in first.root.walk() if node is not first.root and node.symbol in kin]
    for _ in range(_TRIES if nodes else 0):
        mine = rng.choice(nodes)
        same_path = [node for node in kin[mine.symbol] if node.path == mine.path]
        yours = rng.choice(same_path if same_path and rng.random() < 0.5 else kin[mine.symbol])
        if mine.expression == yours.expression:
            continue
        children: list[Variation] = []
        for parent, gone, come in ((first, mine, yours), (second, yours, mine)):
            picks = _without(parent.picks, gone.choices()) | moved(come, gone.scope)
            place = gone.path if gone.path == come.path else f"{gone.path} from {come.path}"
            try:
                child = space.replay(picks, weighted(rng), parent)
            except Overgrown:
                break
            children.append(Variation(derivation=child, operator="cross", place=place))
        if len(children) == 2:
            return children[0], children[1]
    return None


def moved(node: Node, scope: str) -> dict[str, str]:
    """The picks of a node under another scope: as they are called where another node of its symbol stands."""
    skip = len(node.scope) + 1 if node.scope else 0
    return {join(scope, choice.name[skip:]): choice.taken for choice in node.choices()}


def _without(picks: Mapping[str, str], choices: Iterable[Choice]) -> dict[str, str]:
    left = dict(picks)
    for choice in choices:
        del left[choice.name]
    return left


def _nested(first: Node, second: Node) -> bool:
    return any(node is second for node in first.walk()) or any(node is first for node in second.walk())


def _places(parent: Derivation, rng: random.Random) -> Iterator[Node]:
    """Repeated and recursive places, in a random order."""
    nodes = [node for node in parent.root.walk() if node.kind in ("copies", "recursive")]
    yield from rng.sample(nodes, len(nodes))


def _replaced(
    space: Space,
    parent: Derivation,
    node: Node,
    inside: Mapping[str, str],
    rng: random.Random,
    operator: Operator,
) -> Variation | None:
    """The parent with these picks for everything that was decided at and below the node."""
    child = space.replay({**_without(parent.picks, node.choices()), **inside}, weighted(rng), parent)
    if child.picks == parent.picks:
        return None
    return Variation(derivation=child, operator=operator, place=node.path)


def _times(node: Node) -> tuple[Choice, dict[int, str]] | None:
    """The one choice that says how many copies there are, and its numbers with their texts; None where it takes
    more than one choice, or none.
    """
    asked = [choice for child in node.children if child.kind != "copy" for choice in child.choices()]
    if len(asked) != 1 or not all(text.isdigit() for text in asked[0].options):
        return None
    return asked[0], {int(text): text for text in asked[0].options}


def _more_copies(node: Node, rng: random.Random) -> dict[str, str] | None:
    times, copies = _times(node), list(node.copies)
    if times is None:
        return None
    larger = [number for number in times[1] if number > len(copies)]
    if not larger:
        return None
    items: list[Node | None] = list(copies)
    while len(items) < min(larger):
        twin = rng.choice(copies) if rng.random() < 0.5 else None
        items.insert(rng.randint(0, len(items)), twin)
    return {times[0].name: times[1][min(larger)], **_numbered(node, items)}


def _fewer_copies(node: Node, rng: random.Random) -> dict[str, str] | None:
    times, copies = _times(node), node.copies
    if times is None:
        return None
    smaller = [number for number in times[1] if number < len(copies)]
    if not smaller:
        return None
    kept = sorted(rng.sample(range(len(copies)), max(smaller)))
    return {times[0].name: times[1][max(smaller)], **_numbered(node, [copies[index] for index in kept])}


def _numbered(node: Node, items: Sequence[Node | None]) -> dict[str, str]:
    """The picks of copies in this order; None for one that is drawn."""
    picks: dict[str, str] = {}
    for index, item in enumerate(items):
        if item is not None:
            picks |= moved(item, f"{node.path}[{index}]")
    return picks


def _one_more_turn(space: Space, parent: Derivation, node: Node, rng: random.Random) -> dict[str, str] | None:
    """Picks with which another turn of the node's rule stands at its place, and the node itself within that."""
    turn, around = node.inner(), node
    if not turn or rng.random() < 0.5:
        kept = _without(parent.picks, node.choices())
        for _ in range(_TRIES):
            drawn = space.replay(kept, weighted(rng), parent)
            around = next(
                each for each in drawn.root.walk() if each.path == node.path and each.symbol == node.symbol
            )
            turn = around.inner()
            if turn:
                break
        else:
            return None
    hole = rng.choice(turn)
    gone = {choice.name for choice in hole.choices()}
    outside = {choice.name: choice.taken for choice in around.choices() if choice.name not in gone}
    return outside | moved(node, hole.scope)
