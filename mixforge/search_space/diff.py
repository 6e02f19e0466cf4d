"""What tells two derivations of a space, or two architectures, apart, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mixforge.search_space.alignment import align
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.derivation import Derivation, Node, join
from mixforge.search_space.distance import Items, Turn, whole
from mixforge.search_space.spelling import spell_gene, spell_stack, spell_unit
from mixforge.search_space.stack import Layer, Unit, gene_defaults

LONGEST = 120
"""Characters of two expressions that are shown whole."""


def diff(first: Derivation, second: Derivation) -> tuple[str, ...]:
    """How the second differs from the first, a sentence for each edit of their aligned trees; see `distance`.

    A place is named by the end of its path that is its alone; a copy or a turn by its number in its own
    derivation, from 0 as in the names of choices. Empty where the picks are equal.
    """
    names = [choice.name for each in (first, second) for choice in each.choices]
    return tuple(_Diff(frozenset(names)).turns(whole(first), whole(second), ""))


@dataclass(slots=True)
class _Diff:
    names: frozenset[str]
    items: Items = field(default_factory=Items)

    def turns(self, mine: Turn, yours: Turn, scope: str) -> Iterator[str]:
        (before, from_sequences), (after, to_sequences) = mine.parts(), yours.parts()
        told: set[str] = set()
        for name in [name for name in before if name in after and name not in told]:
            if name in told:
                continue
            old, new = before[name], after[name]
            assert old.choice is not None
            assert new.choice is not None
            if old.choice.taken != new.choice.taken:
                sentence, is_whole = _became(old, new)
                yield f"{self.place(join(scope, name))}: {sentence}"
                if is_whole:
                    told |= _below(old, mine) | _below(new, yours)
        for path in dict.fromkeys((*from_sequences, *to_sequences)):
            if path not in told:
                yield from self.sequences(
                    from_sequences.get(path, []), to_sequences.get(path, []), join(scope, path)
                )

    def sequences(self, mine: list[Turn], yours: list[Turn], path: str) -> Iterator[str]:
        rows, columns = list(map(self.items.of, mine)), list(map(self.items.of, yours))
        if not rows or not columns:
            # The choice that brought the sequence or took it away was told.
            return
        for row, column in align(rows, columns, self.items.between, lambda item: item.size):
            if row is not None and column is not None:
                if rows[row] is not columns[column]:
                    yield from self.turns(mine[row], yours[column], mine[row].scope)
            elif row is not None:
                yield f"{self.place(f'{path}[{row}]')}: {_content(mine[row])} is gone"
            elif column is not None:
                yield f"{self.place(f'{path}[{column}]')}: {_content(yours[column])} is new"

    def place(self, path: str) -> str:
        """The shortest end of a path that no other choice's name has."""
        words = path.split("/")
        # `any` and `copy` alone tell nothing.
        least = 2 if words[-1].startswith(("any", "copy")) else 1
        for size in range(least, len(words)):
            end = "/".join(words[-size:])
            if not any(name != path and f"/{name}".endswith(f"/{end}") for name in self.names):
                return _plain(end)
        return _plain(path)


def _plain(place: str) -> str:
    way, _, last = place.rpartition("/")
    return (
        (f"{way}/" if way else "") + last if not _counts(last) else way or last.rpartition(".")[0] or "stack"
    )


def _became(old: Node, new: Node) -> tuple[str, bool]:
    """A sentence, and whether it says everything at and below the two nodes."""
    assert old.choice is not None
    assert new.choice is not None
    before, after = str(old.expression), str(new.expression)
    if before.isdigit() and after.isdigit() and _counts(old.label):
        return f"{before} {'copy' if before == '1' else 'copies'} became {after}", True
    if len(before) + len(after) <= LONGEST:
        return f"{before} became {after}", True
    return f"{_short(old.choice.taken)} became {_short(new.choice.taken)}", False


def _counts(label: str) -> bool:
    """Whether a place says how many copies there are: `times`, `attn.times#2`."""
    return label.partition("#")[0].rpartition(".")[2] == "times"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST // 2 else f"{text[: LONGEST // 2 - 3]}..."


def _below(node: Node, turn: Turn) -> set[str]:
    """The names and paths of what is below a node, within its turn."""
    skip = len(turn.scope) + 1 if turn.scope else 0
    return {each.path[skip:] for each in node.walk() if each is not node}


def _content(turn: Turn) -> str:
    if turn.node.kind == "copy":
        return _short(str(turn.node.expression))
    choices, _ = turn.parts()
    decided = [
        node.choice.taken
        for node in choices.values()
        if node.choice is not None and not any(id(each) in turn.holes for each in node.walk())
    ]
    return _short(", ".join(decided)) or "a turn"


def architecture_diff(first: Architecture, second: Architecture) -> tuple[str, ...]:
    """How the second architecture differs from the first: the words of lm(...), then the layers, aligned.

    Layers are numbered as they stand in their own stack, from 1, reused ones once. Empty where the two are equal.
    """
    sentences = [
        f"{word}: {before} became {after}"
        for word in ("width", "vocab", "embed", "norm", "place")
        if (before := getattr(first, word)) != (after := getattr(second, word))
    ]
    pairs = align(first.stack, second.stack, unit_distance, lambda unit: 1)
    return (*sentences, *_layer_sentences(first, second, pairs))


def unit_distance(first: Unit, second: Unit) -> float:
    """How far two units are apart, where one more or less is 1: nearest are genes of one mixer, then mixers of
    one kind."""
    if first == second:
        return 0
    if not isinstance(first, Layer) or not isinstance(second, Layer):
        return 1.75
    if type(first.mixer) is not type(second.mixer):
        return 1.5 if first.mixer.kind == second.mixer.kind else 2
    return 0.25 + 0.75 * len(_genes(first, second)) / (1 + len(gene_defaults(type(first.mixer))))


def _genes(first: Layer, second: Layer) -> list[str]:
    names = gene_defaults(type(first.mixer))
    return [name for name in names if getattr(first.mixer, name) != getattr(second.mixer, name)]


def _layer_sentences(
    first: Architecture, second: Architecture, pairs: list[tuple[int | None, int | None]]
) -> list[str]:
    """Places to which the same happened share a sentence, where the layers themselves changed."""
    places: dict[str, list[int]] = {}
    for kind, run in _runs(pairs, first, second):
        rows = [row for row, _ in run if row is not None]
        columns = [column for _, column in run if column is not None]
        if kind in ("gone", "new"):
            whose, found = (first, rows) if kind == "gone" else (second, columns)
            text = _short(spell_stack(whose.stack[found[0] : found[-1] + 1], whose.width))
            places[f"{text} {'is' if len(found) == 1 else 'are'} {kind}#{found[0]}"] = found
        elif kind is not None:
            places.setdefault(kind, []).extend(rows)
    return [f"{_layers(found)}: {kind.rpartition('#')[0] or kind}" for kind, found in places.items()]


def _runs(
    pairs: list[tuple[int | None, int | None]], first: Architecture, second: Architecture
) -> list[tuple[str | None, list[tuple[int | None, int | None]]]]:
    """Neighbouring pairs to which the same happened; None where nothing did."""
    runs: list[tuple[str | None, list[tuple[int | None, int | None]]]] = []
    for pair in pairs:
        kind = _change(pair, first, second)
        if runs and runs[-1][0] == kind:
            runs[-1][1].append(pair)
        else:
            runs.append((kind, [pair]))
    return runs


def _change(pair: tuple[int | None, int | None], first: Architecture, second: Architecture) -> str | None:
    row, column = pair
    if row is None or column is None:
        return "new" if row is None else "gone"
    mine, yours = first.stack[row], second.stack[column]
    if mine == yours:
        return None
    if isinstance(mine, Layer) and isinstance(yours, Layer) and type(mine.mixer) is type(yours.mixer):
        word = mine.mixer.word()
        return "; ".join(
            f"{word}.{name}: {spell_gene(getattr(mine.mixer, name))} became {spell_gene(getattr(yours.mixer, name))}"
            for name in _genes(mine, yours)
        )
    return f"{_short(spell_unit(mine, first.width)[0])} became {_short(spell_unit(yours, second.width)[0])}"


def _layers(places: list[int]) -> str:
    """`layer 3`, `layers 1 to 4`, `layers 1, 3, 5`."""
    if len(places) == 1:
        return f"layer {places[0] + 1}"
    if places == list(range(places[0], places[-1] + 1)):
        return f"layers {places[0] + 1} to {places[-1] + 1}"
    return "layers " + ", ".join(str(place + 1) for place in places)
