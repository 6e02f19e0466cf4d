"""What the words of an expression mean: `parse(text)` gives an architecture.

    lm(stack, width=, vocab=, embed=tied|untied, ...)      see `words` for what it takes

    a + b      a, then b
    n * a      n copies of a, each with its own weights
    a | b      beside: both read the same normed input; their outputs are summed into one residual
    n @ a      the same weights applied n times

Inside `|` an integer factor is the branch's share of the heads: `2*a | b` gives a two thirds, `1*a | 1*b`
gives each a half, and without a factor every branch is whole. `beside(a, b, fuse=, norm=)` is the long form of
`|`, `reuse(a, times=, halt=, signal=)` that of `@`; `segment(a, length=, memory=, carry=)` reads the sequence in
segments; `residual(a, place=)` is one residual connection around mixers one after the other, or around one whose norms
stand elsewhere than the model's. A gene is given by name, `attn(window=64)`; `auto` is the value of one that follows
from the width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import cast

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.count import counted
from mixforge.search_space.genes import Form, GeneValue
from mixforge.search_space.genes import Gene as Gene
from mixforge.search_space.genes import genes_of as genes_of
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.stack import (
    FORMS,
    MOST_BRANCHES,
    MOST_UNITS,
    Beside,
    BranchNorm,
    Fuse,
    Layer,
    Residual,
    Reuse,
    Segment,
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
    spell_number,
    understand,
)
from mixforge.search_space.vocabulary import gene_value, interpret_mixer
from mixforge.search_space.vocabulary import mixer_named as mixer_named
from mixforge.search_space.vocabulary import parse_mixer as parse_mixer
from mixforge.search_space.vocabulary import vocabulary as vocabulary
from mixforge.search_space.words import WIDTH, WORDS


class TooDeep(NotationError):
    """A stack that has a meaning, but more layers than are allowed."""


def parse(text: str) -> Architecture:
    """The architecture that an expression `lm(...)` means. It may be illegal: `why_illegal` says so.

    Raises NotationError, which shows the place, where the text is not such an expression.
    """
    return understand(text, interpret)


def interpret(tree: Expression) -> Architecture:
    """The architecture that a tree `lm(...)` means. Raises NotationError."""
    if not isinstance(tree, Apply) or tree.function != "lm":
        raise NotationError("an architecture is written lm(stack, width=...)", tree.column)
    if len(tree.arguments) != 1:
        raise NotationError(
            f"lm takes one stack, then width= and others by name; {len(tree.arguments)} are given",
            tree.column,
        )
    words = _words(tree, {"width": WIDTH, **WORDS})
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


def _words(tree: Apply, known: Mapping[str, Gene]) -> dict[str, GeneValue]:
    """What is given by name in `lm(...)` and the long forms. Raises NotationError."""
    words: dict[str, GeneValue] = {}
    for word, value in tree.keywords:
        if word not in known:
            raise NotationError(
                f"{tree.function} has no '{word}'{nearest(word, known)}; it has {', '.join(known)}",
                tree.keyword_column(word),
            )
        if word in words:
            raise NotationError(f"'{word}' is given twice", tree.keyword_column(word))
        words[word] = gene_value(tree.function, known[word], value)
    return words


def interpret_stack(tree: Expression) -> tuple[Unit, ...]:
    """The units of a stack, repeats written out, before any width is known. Raises NotationError."""
    units = tuple(_units(tree))
    _bound(depth(units), tree.column)
    return units


@lru_cache(maxsize=65_536)
def _layer(tree: Expression) -> Layer:
    return Layer(interpret_mixer(tree))


def _is_mixer(tree: Expression) -> bool:
    return tree.function not in FORMS if isinstance(tree, Apply) else isinstance(tree, Name)


def _units(tree: Expression) -> list[Unit]:
    if _is_mixer(tree):
        return [_layer(tree)]
    match tree:
        case Operation(symbol="+"):
            units: list[Unit] = []
            for operand in operands(tree, "+"):
                units += (_layer(operand),) if _is_mixer(operand) else _units(operand)
        case Operation(symbol="*"):
            times, body = _times(tree), _units(tree.right)
            _bound(times * len(body), tree.column)
            units = times * body
        case Operation(symbol="@"):
            times, body = _times(tree), _units(tree.right)
            _bound(times * depth(tuple(body)), tree.column)
            return [Reuse(times, tuple(body))]
        case Operation(symbol="|"):
            return [_beside(operands(tree, "|"), {}, tree.column)]
        case Operation():
            raise NotationError(
                "'**' draws anew each time, in a search space; an architecture has n * a", tree.column
            )
        case Apply(function="beside"):
            return [_beside(list(tree.arguments), _words(tree, FORMS["beside"]), tree.column)]
        case Apply(function="reuse" | "segment" | "residual"):
            return [_long_stack(tree)]
        case _:
            return [_layer(tree)]
    _bound(len(units), tree.column)
    return units


def _long_stack(tree: Apply) -> Unit:
    """`reuse(stack, times=, ...)`, `segment(stack, length=, ...)` or `residual(stack, place=)`."""
    words = _words(tree, FORMS[tree.function])
    word, example = {"reuse": ("times", "8"), "segment": ("length", "8"), "residual": ("place", "post")}[
        tree.function
    ]
    if len(tree.arguments) != 1 or (word not in words and tree.function != "residual"):
        raise NotationError(
            f"{tree.function} takes one stack and {word}=, as in {tree.function}(attn + mlp, {word}={example})",
            tree.column,
        )
    body = tuple(_units(tree.arguments[0]))
    if tree.function == "residual":
        try:
            return Residual(body, **words)  # type: ignore[arg-type]
        except ValueError as error:
            raise NotationError(str(error), tree.column) from None
    if tree.function == "segment":
        return Segment(body, **{"memory": FORMS["segment"]["memory"].default, **words})  # type: ignore[arg-type]
    unit = Reuse(body=body, **words)  # type: ignore[arg-type]
    _bound(depth((unit,)), tree.column)
    return unit


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


def _beside(branches: list[Expression], words: Mapping[str, GeneValue], column: int | None) -> Beside:
    if not 2 <= len(branches) <= MOST_BRANCHES:
        raise NotationError(
            f"{counted(len(branches), 'mixer')} beside one another; there are 2 to {MOST_BRANCHES}", column
        )
    mixers: list[Mixer] = []
    shares: list[int | None] = []
    for branch in branches:
        share = None
        if isinstance(branch, Operation) and branch.symbol == "*":
            share, branch = _times(branch), branch.right
        if isinstance(branch, Operation) or (isinstance(branch, Apply) and branch.function in FORMS):
            raise NotationError(
                "a branch of '|' is one mixer, with at most a factor before it", branch.column
            )
        mixers.append(_layer(branch).mixer)
        shares.append(share)
    given = None if all(share is None for share in shares) else tuple(share or 1 for share in shares)
    return Beside(tuple(mixers), shares=given, **words)  # type: ignore[arg-type]


def from_json(text: str) -> Architecture:
    """The architecture of a canonical JSON text, as a database keeps it. Raises ValueError."""
    try:
        record = json.loads(text)
        units = tuple(_unit_from_json(each) for each in record.pop("units"))
        if "norm" in record:
            record["norm"] = gene_value("lm", WORDS["norm"], read(str(record["norm"])))
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
            fuse, norm = cast(Fuse, more.get("fuse", "sum")), cast(BranchNorm | None, more.get("norm"))
            return Beside(mixers, fuse, None if shares is None else tuple(cast("list[int]", shares)), norm)
        case {"reuse": int(times), "body": list(body), **more}:
            halt, signal = (str(more.get(word, "none")) for word in ("halt", "signal"))
            return Reuse(times, tuple(map(_unit_from_json, body)), halt, signal)
        case {"segment": int(length), "body": list(body), "memory": int(memory), **more}:
            carry = gene_value("segment", FORMS["segment"]["carry"], read(str(more.get("carry", "tokens"))))
            return Segment(tuple(map(_unit_from_json, body)), length, memory, cast(str | Form, carry))
        case {"residual": list(body), **more}:
            return Residual(tuple(map(_unit_from_json, body)), cast(str | None, more.get("place")))
    raise ValueError(f"{record!r} is not a unit of an architecture")


def _mixer_from_json(word: str, genes: dict[str, str | int | float | None]) -> Mixer:
    values = {name: Name("auto") if value is None else read(_spelled(value)) for name, value in genes.items()}
    return interpret_mixer(Apply(word, (), tuple(values.items())))


def _spelled(value: str | int | float) -> str:
    # As Python writes them, numbers past nine digits are not read.
    return spell_number(value) if isinstance(value, int | float) else str(value)
