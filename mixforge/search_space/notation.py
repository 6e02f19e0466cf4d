"""What the words of an expression mean: `parse(text)` gives an architecture.

    lm(stack, width=, vocab=, embed=tied|untied, norm=rms|layer, place=pre|post|sandwich)

    a + b      a, then b
    n * a      n copies of a, each with its own weights
    a | b      beside: both read the same normed input; their outputs are summed into one residual
    n @ a      the same weights applied n times

Inside `|` an integer factor is the branch's share of the heads: `2*a | b` gives a two thirds, `1*a | 1*b`
gives each a half, and without a factor every branch is whole. `beside(a, b, fuse=sum|mean|gate|concat)` is
the long form of `|`. A gene is given by name, `attn(window=64)`; `auto` is the value of one that follows from
the width.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import cast

from mixforge.search_space.architecture import CHOICES, LARGEST_VOCAB, WIDEST, Architecture
from mixforge.search_space.genes import Gene as Gene
from mixforge.search_space.genes import Whole
from mixforge.search_space.genes import genes_of as genes_of
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.stack import (
    FUSES,
    MOST_BRANCHES,
    MOST_UNITS,
    Beside,
    Fuse,
    Layer,
    Reuse,
    Unit,
    depth,
)
from mixforge.search_space.syntax import (
    Apply,
    Expression,
    Name,
    NotationError,
    Number,
    Operation,
    nearest,
    operands,
    read,
)
from mixforge.search_space.vocabulary import interpret_mixer
from mixforge.search_space.vocabulary import mixer_named as mixer_named
from mixforge.search_space.vocabulary import parse_mixer as parse_mixer
from mixforge.search_space.vocabulary import vocabulary as vocabulary

_SIZES = {"width": Whole(1, WIDEST), "vocab": Whole(2, LARGEST_VOCAB)}


class TooDeep(NotationError):
    """A stack that has a meaning, but more layers than are allowed."""


def parse(text: str) -> Architecture:
    """The architecture that an expression `lm(...)` means. It may be illegal: `why_illegal` says so.

    Raises NotationError, which shows the place, where the text is not such an expression.
    """
    try:
        return interpret(read(text))
    except NotationError as error:
        raise error.within(text) from None


def interpret(tree: Expression) -> Architecture:
    """The architecture that a tree `lm(...)` means. Raises NotationError."""
    if not isinstance(tree, Apply) or tree.function != "lm":
        raise NotationError("an architecture is written lm(stack, width=...)", tree.column)
    if len(tree.arguments) != 1:
        raise NotationError(
            f"lm takes one stack, then width= and others by name; {len(tree.arguments)} are given",
            tree.column,
        )
    words: dict[str, int | str] = {}
    for word, value in tree.keywords:
        if word not in _SIZES and word not in CHOICES:
            known = [*_SIZES, *CHOICES]
            raise NotationError(
                f"lm has no '{word}'{nearest(word, known)}; it has {', '.join(known)}",
                tree.keyword_column(word),
            )
        if word in words:
            raise NotationError(f"'{word}' is given twice", tree.keyword_column(word))
        words[word] = _size(word, value) if word in _SIZES else _choice(word, value, CHOICES[word])
    if "width" not in words:
        raise NotationError("lm needs a width, as in lm(stack, width=128)", tree.column)
    try:
        return Architecture(interpret_stack(tree.arguments[0]), **words)  # type: ignore[arg-type]
    except NotationError:
        raise
    except ValueError as error:
        raise NotationError(str(error), tree.column) from None
    except RecursionError:
        raise NotationError("the expression is nested too deeply", tree.column) from None


def interpret_stack(tree: Expression) -> tuple[Unit, ...]:
    """The units of a stack, repeats written out, before any width is known. Raises NotationError."""
    units = tuple(_units(tree))
    _bound(depth(units), tree.column)
    return units


@lru_cache(maxsize=65_536)
def _layer(tree: Expression) -> Layer:
    return Layer(interpret_mixer(tree))


def _units(tree: Expression) -> list[Unit]:
    match tree:
        case Operation(symbol="+"):
            units = [unit for operand in operands(tree, "+") for unit in _units(operand)]
        case Operation(symbol="*"):
            times, body = _times(tree), _units(tree.right)
            _bound(times * len(body), tree.column)
            units = times * body
        case Operation(symbol="@"):
            times, body = _times(tree), _units(tree.right)
            _bound(times * depth(tuple(body)), tree.column)
            return [Reuse(times, tuple(body))]
        case Operation(symbol="|"):
            return [_beside(operands(tree, "|"), "sum", tree.column)]
        case Operation():
            raise NotationError(
                "'**' draws anew each time, in a search space; an architecture has n * a", tree.column
            )
        case Apply(function="beside"):
            return [_long_beside(tree)]
        case _:
            return [_layer(tree)]
    _bound(len(units), tree.column)
    return units


def _bound(units: int, column: int | None) -> None:
    if units > MOST_UNITS:
        raise TooDeep(f"the stack is {units} layers deep; at most {MOST_UNITS} are allowed", column)


def _times(tree: Operation) -> int:
    match tree.left:
        case Number(value=int() as times) if 1 <= times <= MOST_UNITS:
            return times
        case Number():
            raise NotationError(
                f"{tree.left} is not a whole number of times from 1 to {MOST_UNITS}", tree.left.column
            )
    raise NotationError(f"the number stands first, as in 3 {tree.symbol} attn", tree.column)


def _long_beside(tree: Apply) -> Beside:
    fuse = "sum"
    for word, value in tree.keywords:
        if word != "fuse":
            raise NotationError(
                f"beside has no '{word}'{nearest(word, ['fuse'])}; it has fuse", tree.keyword_column(word)
            )
        fuse = _choice("fuse", value, FUSES)
    return _beside(list(tree.arguments), cast(Fuse, fuse), tree.column)


def _beside(branches: list[Expression], fuse: Fuse, column: int | None) -> Beside:
    if not 2 <= len(branches) <= MOST_BRANCHES:
        raise NotationError(
            f"{len(branches)} mixers beside one another; there are 2 to {MOST_BRANCHES}", column
        )
    mixers: list[Mixer] = []
    shares: list[int | None] = []
    for branch in branches:
        share = None
        if isinstance(branch, Operation) and branch.symbol == "*":
            share, branch = _times(branch), branch.right
        if isinstance(branch, Operation) or (isinstance(branch, Apply) and branch.function == "beside"):
            raise NotationError(
                "a branch of '|' is one mixer, with at most a factor before it", branch.column
            )
        mixers.append(interpret_mixer(branch))
        shares.append(share)
    given = None if all(share is None for share in shares) else tuple(share or 1 for share in shares)
    return Beside(tuple(mixers), fuse, given)


def _size(word: str, tree: Expression) -> int:
    domain = _SIZES[word]
    if isinstance(tree, Number) and isinstance(tree.value, int) and domain.has(tree.value):
        return tree.value
    raise NotationError(f"{word}={tree} is not legal; expected {domain}", tree.column)


def _choice(word: str, tree: Expression, known: tuple[str, ...]) -> str:
    if isinstance(tree, Name) and tree.id in known:
        return tree.id
    hint = nearest(str(tree), known) if isinstance(tree, Name) else ""
    raise NotationError(f"{word}={tree} is not legal{hint}; expected {', '.join(known)}", tree.column)


def from_json(text: str) -> Architecture:
    """The architecture of a canonical JSON text, as a database keeps it. Raises ValueError."""
    try:
        record = json.loads(text)
        units = tuple(_unit_from_json(each) for each in record.pop("units"))
        return Architecture(units, **record)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"this is not the JSON of an architecture: {error!r}") from error


def _unit_from_json(record: object) -> Unit:
    match record:
        case [str(word), dict(genes)]:
            return Layer(_mixer_from_json(word, genes))
        case {"beside": list(branches), **more}:
            mixers = tuple(_mixer_from_json(word, genes) for word, genes in branches)
            shares = more.get("shares")
            fuse = cast(Fuse, more.get("fuse", "sum"))
            return Beside(mixers, fuse, None if shares is None else tuple(cast("list[int]", shares)))
        case {"reuse": int(times), "body": list(body)}:
            return Reuse(times, tuple(map(_unit_from_json, body)))
    raise ValueError(f"{record!r} is not a unit of an architecture")


def _mixer_from_json(word: str, genes: dict[str, str | int | float | None]) -> Mixer:
    values = {name: Name("auto") if value is None else read(str(value)) for name, value in genes.items()}
    return interpret_mixer(Apply(word, (), tuple(values.items())))
