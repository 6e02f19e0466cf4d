"""The reader that makes of a text the tree that text, Python and grammars share.

    lm(6 * (3 * (gdn + swiglu) + attn(window=1024) + swiglu), width=512)

is Python's own expression syntax with Python's precedence, so the same characters typed into Python (with the
names of `mixforge.words`) give the same tree. Text is read with `ast` and rebuilt from a closed list of node
types, but for plain texts, which have a faster reader for the same trees (`plain_reader`); nothing is evaluated.
This module knows no mixer and loads no torch: what names mean is said in `notation`.

A tree of the faster reader does not know where in the text its nodes stood. Where a tree turns out to mean nothing,
`understand` reads the text again with places, so that its error shows one.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from mixforge.search_space.expression import Apply as Apply
from mixforge.search_space.expression import Expression as Expression
from mixforge.search_space.expression import Name as Name
from mixforge.search_space.expression import NotationError as NotationError
from mixforge.search_space.expression import Number as Number
from mixforge.search_space.expression import Operand as Operand
from mixforge.search_space.expression import Operation as Operation
from mixforge.search_space.expression import Symbol as Symbol
from mixforge.search_space.expression import Table as Table
from mixforge.search_space.expression import expression as expression
from mixforge.search_space.expression import is_name as is_name
from mixforge.search_space.expression import nearest as nearest
from mixforge.search_space.expression import operands as operands
from mixforge.search_space.expression import spell as spell
from mixforge.search_space.expression import spell_number as spell_number
from mixforge.search_space.expression import walk as walk
from mixforge.search_space.plain_reader import DEEPEST_NESTING, plain

LONGEST_TEXT = 16_384
MOST_OPERATORS = 2_048

_SYMBOLS: dict[type[ast.operator], Symbol] = {
    ast.Add: "+",
    ast.Mult: "*",
    ast.BitOr: "|",
    ast.MatMult: "@",
    ast.Pow: "**",
}
# A number ends where no letter, digit or dot follows: `1if x` and `1..real` never reach Python's own reader.
_TOKENS = re.compile(
    r"(?:[ \t\r\n]+|[A-Za-z_][A-Za-z0-9_]{0,63}(?![A-Za-z0-9_])"
    r"|(?:[0-9]{1,9}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,3})?(?![A-Za-z0-9_.])"
    r"|\*\*|[-+*|@(),=:{}])*"
)
_BRACKETS = re.compile(r"[(){}]")


Meaning = TypeVar("Meaning")


def read(text: str) -> Expression:
    """The tree of a text. Raises NotationError, with a caret below the place, for anything else."""
    tree = plain(text) if len(text) <= LONGEST_TEXT and _operators(text) <= MOST_OPERATORS else None
    return read_with_places(text) if tree is None else tree


def understand(text: str, meaning: Callable[[Expression], Meaning]) -> Meaning:
    """What `meaning` makes of the tree of a text; a NotationError of either shows the place."""
    with suppress(NotationError):
        return meaning(read(text))
    try:
        return meaning(read_with_places(text))
    except NotationError as error:
        raise error.within(text) from None


def read_with_places(text: str) -> Expression:
    """As `read`; every node of the tree has its `column`."""
    try:
        return _Reader(text).read()
    except NotationError as error:
        raise error.within(text) from None


def _operators(text: str) -> int:
    return sum(map(text.count, "+*|@-"))


class _Reader:
    """One text on its way to a tree: bounds, then characters, then Python's own reader, then our nodes."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_TEXT:
            raise NotationError(
                f"the expression has {len(text)} characters; at most {LONGEST_TEXT} are read", 0, text[:100]
            )
        self.text = text
        self.shift = len(text) - len(text.lstrip())

    def read(self) -> Expression:
        self._check_characters()
        self._check_nesting()
        line = re.sub(r"[\t\r\n]", " ", self.text).strip()
        if not line:
            raise NotationError(
                "the expression is empty; expected one such as lm(6 * (attn + swiglu), width=128)"
            )
        try:
            tree = ast.parse(line, mode="eval")
        except SyntaxError as error:
            column = self.shift + max(0, (error.offset or 1) - 1)
            raise NotationError(
                "this is not an expression; expected names, numbers and calls joined by + * | @", column
            ) from None
        except (RecursionError, MemoryError):
            raise NotationError("the expression is nested too deeply", 0) from None
        return self._node(tree.body)

    def _check_characters(self) -> None:
        matched = _TOKENS.match(self.text)
        stop = matched.end() if matched else 0
        if stop == len(self.text):
            return
        sign = self.text[stop]
        if sign.isdigit() and sign.isascii():
            raise NotationError("this number is not a plain one of at most 9 digits", stop)
        if sign.isascii() and (sign.isalpha() or sign == "_"):
            raise NotationError("a name has at most 64 letters, digits and underscores", stop)
        shown = repr(sign) if sign.isprintable() else f"U+{ord(sign):04X}"
        raise NotationError(
            f"{shown} has no place here; expected names, numbers, ( ) , = + * | @ and in a space ** {{ : }}",
            stop,
        )

    def _check_nesting(self) -> None:
        if self.text.count("(") + self.text.count("{") > DEEPEST_NESTING:
            self._check_depth()
        operators = _operators(self.text)
        if operators > MOST_OPERATORS:
            raise NotationError(
                f"the expression has {operators} operators; at most {MOST_OPERATORS} are read", 0
            )

    def _check_depth(self) -> None:
        depth = 0
        for bracket in _BRACKETS.finditer(self.text):
            depth += 1 if bracket.group() in "({" else -1
            if depth > DEEPEST_NESTING:
                raise NotationError(f"brackets are nested deeper than {DEEPEST_NESTING}", bracket.start())

    def _node(self, node: ast.expr) -> Expression:
        if not isinstance(node, ast.BinOp):
            return self._leaf(node)
        # A sum of a thousand terms is a left spine of that depth, walked in a loop.
        spine: list[ast.BinOp] = []
        while isinstance(node, ast.BinOp):
            spine.append(node)
            node = node.left
        result = self._leaf(node)
        for operation in reversed(spine):
            symbol = _SYMBOLS.get(type(operation.op))
            if symbol is None:
                raise NotationError("this operator is not one of + * | @ **", self._column(operation))
            result = self._operation(symbol, result, self._node(operation.right))
        return result

    def _operation(self, symbol: Symbol, left: Expression, right: Expression) -> Expression:
        if isinstance(left, Number) and isinstance(right, Number):
            if symbol not in "+*":
                raise NotationError(
                    f"'{symbol}' stands between a number and a layer, not two numbers", left.column
                )
            # Python itself computes 2 * 3 before it meets the layer in 2 * 3 * attn.
            value = left.value + right.value if symbol == "+" else left.value * right.value
            return Number(_bounded(value, left.column), left.column)
        return Operation(symbol, left, right, left.column)

    def _leaf(self, node: ast.expr) -> Expression:
        # Asked of every word and number of a text, so by type and not by pattern.
        column = self.shift + node.col_offset
        if isinstance(node, ast.Name):
            return Name(node.id, column)
        if isinstance(node, ast.Constant):
            return self._constant(node, column)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._apply(node.func.id, node, column)
        if isinstance(node, ast.Dict):
            return self._table(node, column)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            match node.operand:
                case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                    return Number(_bounded(-value, column), column)
        raise NotationError("expected a name, a number, a call such as attn(window=64), or brackets", column)

    def _constant(self, node: ast.Constant, column: int) -> Number:
        value = node.value
        if isinstance(value, bool) or value is None:
            raise NotationError(f"{value!r} is Python's word, not one of ours; say none", column)
        if isinstance(value, int | float):
            return Number(_bounded(value, column), column)
        raise NotationError("expected a name, a number, a call such as attn(window=64), or brackets", column)

    def _apply(self, function: str, node: ast.Call, column: int) -> Apply:
        keywords: dict[str, Expression] = {}
        for each in node.keywords:
            if each.arg is None:
                raise NotationError("'**' has no place before an argument", self._column(each.value))
            if each.arg in keywords:
                raise NotationError(f"'{each.arg}' is given twice", self.shift + each.col_offset)
            keywords[each.arg] = self._node(each.value)
        places = tuple(self.shift + each.col_offset for each in node.keywords)
        return Apply(function, tuple(map(self._node, node.args)), tuple(keywords.items()), column, places)

    def _table(self, node: ast.Dict, column: int) -> Table:
        pairs: list[tuple[Expression, Expression]] = []
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                raise NotationError("'**' has no place in a table of weights", column)
            pairs.append((self._node(key), self._node(value)))
        return Table(tuple(pairs), column)

    def _column(self, node: ast.expr) -> int:
        return self.shift + node.col_offset


def _bounded(value: int | float, column: int | None) -> int | float:
    if abs(value) > 1e12 or not math.isfinite(value):
        raise NotationError("numbers go up to 1e12", column)
    return value
