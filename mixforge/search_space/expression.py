"""The tree that text, Python and grammars share: its nodes, and how they are written down.

This module knows no mixer and loads no torch: what names mean is said in `notation`.
"""

from __future__ import annotations

import builtins
import difflib
import keyword
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, TypeGuard, TypeVar, Union, dataclass_transform

Symbol = Literal["+", "*", "|", "@", "**"]
Operand = Union["Expression", int, float, str, None, Mapping["Expression", "Operand"], Callable[..., object]]

Node = TypeVar("Node", bound="Expression")

_BINDING: dict[Symbol, int] = {"|": 1, "+": 2, "*": 3, "@": 3, "**": 5}


class NotationError(ValueError):
    """What is wrong with an expression: a sentence and, where the text is known, the line with a caret below
    it.
    """

    def __init__(self, message: str, column: int | None = None, text: str | None = None) -> None:
        super().__init__(message, column, text)
        self.message = message
        self.column = column
        """Characters before the place in question, from the beginning of the text; None where it has no text.
        """
        self.text = text

    def within(self, text: str) -> NotationError:
        """The same error, showing `text`, where it does not show one yet."""
        return self if self.text is not None else NotationError(self.message, self.column, text)

    def __str__(self) -> str:
        if self.text is None or self.column is None:
            return self.message
        column = min(self.column, len(self.text))
        start = self.text.rfind("\n", 0, column) + 1
        end = self.text.find("\n", column)
        line = self.text[start : len(self.text) if end < 0 else end]
        place = column - start
        first = max(0, place - 60)
        shown = "".join(sign if sign.isprintable() else "?" for sign in line[first : first + 100])
        number = self.text.count("\n", 0, column) + 1
        where = f"column {place + 1}" if number == 1 else f"line {number}, column {place + 1}"
        return f"{self.message} ({where})\n    {shown}\n    {' ' * (place - first)}^"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'gdn'?` where a known name is near, else an empty text."""
    matches = difflib.get_close_matches(name[:64].lower(), sorted(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


class Expression:
    """A node. Frozen; equal by value, wherever in a text it stood. `a + b`, `3 * a`, `2 @ a`, `a | b` make
    nodes.
    """

    __slots__ = ()
    column: int | None
    _hash: int

    def __add__(self, other: Operand) -> Expression:
        return Operation("+", self, expression(other))

    def __radd__(self, other: Operand) -> Expression:
        return Operation("+", expression(other), self)

    def __mul__(self, other: Operand) -> Expression:
        return Operation("*", self, expression(other))

    def __rmul__(self, other: Operand) -> Expression:
        return Operation("*", expression(other), self)

    def __matmul__(self, other: Operand) -> Expression:
        return Operation("@", self, expression(other))

    def __rmatmul__(self, other: Operand) -> Expression:
        return Operation("@", expression(other), self)

    def __or__(self, other: Operand) -> Expression:
        return Operation("|", self, expression(other))

    def __ror__(self, other: Operand) -> Expression:
        return Operation("|", expression(other), self)

    def __pow__(self, other: Operand) -> Expression:
        return Operation("**", self, expression(other))

    def __rpow__(self, other: Operand) -> Expression:
        return Operation("**", expression(other), self)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Expression):
            return NotImplemented
        return _same(self, other)

    def __str__(self) -> str:
        return spell(self)


@dataclass_transform(eq_default=False, frozen_default=True, field_specifiers=(field,))
def _node(kind: type[Node]) -> type[Node]:
    """A dataclass that is frozen for the type checker alone: a text has hundreds of nodes, and to make one that is frozen
    takes three times as long, a quarter of reading.
    """
    return dataclass(slots=True, eq=False)(kind)


@_node
class Name(Expression):
    """A word: a mixer, an alias, a gene's value, a rule. Calling it in Python makes an `Apply`."""

    id: str
    column: int | None = field(default=None, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((Name, self.id)))

    def __call__(self, *arguments: Operand, **keywords: Operand) -> Expression:
        return Apply(
            self.id,
            tuple(expression(argument) for argument in arguments),
            tuple((name, expression(value)) for name, value in keywords.items()),
        )

    def __reduce__(self) -> tuple[type[Name], tuple[str, int | None]]:
        return Name, (self.id, self.column)


@_node
class Number(Expression):
    """A whole or decimal number. `2` and `2.0` are equal, so both are kept as the whole number: what is remembered of
    one tree is then true of every tree that equals it.
    """

    value: int | float
    column: int | None = field(default=None, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.value, float) and self.value.is_integer():
            object.__setattr__(self, "value", int(self.value))
        object.__setattr__(self, "_hash", hash((Number, self.value)))

    def __reduce__(self) -> tuple[type[Number], tuple[int | float, int | None]]:
        return Number, (self.value, self.column)


@_node
class Apply(Expression):
    """A name with arguments: `attn(window=64)`, `gqa(4)`, `any(a, b)`, `lm(stack, width=64)`."""

    function: str
    arguments: tuple[Expression, ...]
    keywords: tuple[tuple[str, Expression], ...]
    column: int | None = field(default=None, repr=False)
    keyword_columns: tuple[int, ...] = field(default=(), repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((Apply, self.function, self.arguments, self.keywords)))

    def __reduce__(self) -> tuple[type[Apply], tuple[object, ...]]:
        return Apply, (self.function, self.arguments, self.keywords, self.column, self.keyword_columns)

    def keyword_column(self, word: str) -> int | None:
        """Where a keyword stood in the text; the call's own place where that is not known."""
        words = [each for each, _ in self.keywords]
        # The last of a word that is given twice.
        place = len(words) - 1 - words[::-1].index(word)
        return self.keyword_columns[place] if self.keyword_columns else self.column


@_node
class Operation(Expression):
    """Two operands and the operator between them."""

    symbol: Symbol
    left: Expression
    right: Expression
    column: int | None = field(default=None, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.symbol, self.left._hash, self.right._hash)))

    def __reduce__(self) -> tuple[type[Operation], tuple[object, ...]]:
        return Operation, (self.symbol, self.left, self.right, self.column)


@_node
class Table(Expression):
    """Weighted options, `{a: 3, b: 1}`."""

    pairs: tuple[tuple[Expression, Expression], ...]
    column: int | None = field(default=None, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((Table, self.pairs)))

    def __reduce__(self) -> tuple[type[Table], tuple[object, ...]]:
        return Table, (self.pairs, self.column)


def _same(left: Expression, right: Expression) -> bool:
    # The left spine of a long sum is walked in a loop: it may be deeper than Python's stack.
    while left is not right:
        if type(left) is not type(right) or left._hash != right._hash:
            return False
        if not isinstance(left, Operation) or not isinstance(right, Operation):
            return _content(left) == _content(right)
        if left.symbol != right.symbol or left.right != right.right:
            return False
        left, right = left.left, right.left
    return True


def _content(node: Expression) -> tuple[object, ...]:
    match node:
        case Apply():
            return (node.function, node.arguments, node.keywords)
        case Name():
            return (node.id,)
        case Number():
            return (node.value,)
        case Table():
            return node.pairs
    raise AssertionError(f"{type(node).__name__} is not an expression node")


def expression(value: Operand) -> Expression:
    """A Python value as a node: numbers, strings that are names, None (`none`), a dict (a table), `sum` and
    `any`.

    Raises NotationError for anything else.
    """
    if isinstance(value, Expression):
        return value
    if value is None:
        return Name("none")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Number(value)
    if isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value):
        return Name(value)
    if isinstance(value, Mapping):
        return Table(tuple((expression(option), expression(weight)) for option, weight in value.items()))
    # `fuse=sum` reads the same in Python, where `sum` is a builtin.
    for builtin in (builtins.sum, builtins.any):
        if value is builtin:
            return Name(builtin.__name__)
    raise NotationError(f"{value!r} is neither a name, a number nor an expression")


def operands(node: Expression, symbol: Symbol) -> list[Expression]:
    """The operands of a chain of one operator, in order: `a + b + c` gives [a, b, c]."""
    found: list[Expression] = []
    while isinstance(node, Operation) and node.symbol == symbol:
        found.append(node.right)
        node = node.left
    found.append(node)
    return found[::-1]


def spell(node: Expression) -> str:
    """The text that `read` turns into this tree."""
    return _spell(node, 0)


def _spell(node: Expression, binding: int) -> str:
    match node:
        case Name():
            return node.id
        case Number():
            return spell_number(node.value)
        case Apply():
            parts = [_spell(argument, 0) for argument in node.arguments]
            parts += [f"{name}={_spell(value, 0)}" for name, value in node.keywords]
            return f"{node.function}({', '.join(parts)})"
        case Table():
            return "{" + ", ".join(f"{_spell(key, 0)}: {_spell(value, 0)}" for key, value in node.pairs) + "}"
        case Operation():
            return _spell_operation(node, binding)
    raise AssertionError(f"{type(node).__name__} is not an expression node")


def _spell_operation(node: Operation, binding: int) -> str:
    own = _BINDING[node.symbol]
    first, *others = operands(node, node.symbol) if node.symbol != "**" else [node.left, node.right]
    # `**` groups to the right, the others to the left; the side that would regroup takes brackets.
    left, right = (own + 1, own) if node.symbol == "**" else (own, own + 1)
    parts = [_spell(first, left), *(_spell(other, right) for other in others)]
    text = f" {node.symbol} ".join(parts)
    return f"({text})" if own < binding else text


def spell_number(value: int | float) -> str:
    """The shortest text of a number that is read as this number: one that is whole has no decimal point."""
    if not 1e9 <= abs(value) < math.inf:
        return str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)
    if value < 0:
        return f"-{spell_number(-value)}"
    # At most nine digits are read before a point: 1e9, 15e10; with more of them, 1.2345678901e10.
    whole, _, fraction = f"{Decimal(repr(value)):f}".partition(".")
    digits = (whole + fraction).rstrip("0")
    if len(digits) <= 9:
        return f"{digits}e{len(whole) - len(digits)}"
    return f"{digits[0]}.{digits[1:]}e{len(whole) - 1}"


def is_name(node: Expression, *names: str) -> TypeGuard[Name]:
    """Whether a node is one of these bare names."""
    return isinstance(node, Name) and node.id in names


def walk(node: Expression) -> Iterator[Expression]:
    """Every node of a tree, in the order of its text."""
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        match node:
            case Operation():
                pending += [node.right, node.left]
            case Apply():
                pending += [value for _, value in reversed(node.keywords)]
                pending += reversed(node.arguments)
            case Table():
                pending += [each for pair in reversed(node.pairs) for each in reversed(pair)]
