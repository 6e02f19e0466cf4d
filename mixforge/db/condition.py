"""What people write after `--where`: a condition on the columns of the view `trials`.

    bits_per_byte < 2.1 and decode_ms < 1.5 and "gdn" in mixers and not reused
    campaign = "laptop" and (outcome != ok or width in (128, 256)) and architecture like "%attn%"

Comparisons (`=` and `==`, `!=` and `<>`, `<`, `<=`, `>`, `>=`, also in a chain), `in`, `like`, `is none`,
`and`, `or`, `not` and parentheses. Names come from a closed table and values are bound, so a condition can
only select. A digest may be shortened; a bare word that is no column is a text (`outcome = ok`).
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Boolean, ColumnElement, DateTime, String, and_, false, literal, not_, or_

from mixforge.db.tables import Instant
from mixforge.db.views import trials

COLUMNS: tuple[str, ...] = tuple(column.name for column in trials.columns if column.name != "id")
"""What a condition may name."""

LONGEST = 4096
DEEPEST = 50

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<string>'[^']*'|"[^"]*")
    |(?P<sign><=|>=|==|!=|<>|[=<>(),]))""",
    re.VERBOSE,
)
_COMPARISONS: dict[str, Callable[..., ColumnElement[bool]]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_WHOLE = re.compile(r"[-+]?\d{1,18}")
_WORDS = ("and", "or", "not", "in", "like", "is", "none", "null", "true", "false")


class QueryError(ValueError):
    """A condition, column or order that cannot be read; the message shows where and what was expected."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    """`number`, `word`, `string`, `sign` or `end`."""
    text: str
    column: int

    @property
    def word(self) -> str:
        return self.text.lower() if self.kind == "word" else ""


@dataclass(frozen=True, slots=True)
class _Operand:
    """A column, or a value that was written."""

    token: _Token
    column: ColumnElement[object] | None
    value: float | str | bool | None

    @property
    def kind(self) -> str:
        if self.column is None:
            return {bool: "truth", str: "text"}.get(type(self.value), "number")
        if isinstance(self.column.type, Boolean):
            return "truth"
        if isinstance(self.column.type, Instant | DateTime):
            return "time"
        return "text" if isinstance(self.column.type, String) else "number"


def read_condition(text: str) -> ColumnElement[bool]:
    """The SQL condition that a text means. Raises QueryError, with the column and the nearest known name."""
    if len(text) > LONGEST:
        raise QueryError(f"the condition has {len(text)} characters; at most {LONGEST} are read")
    return _Reader(text).condition()


def read_column(name: str) -> str:
    """A column's name as it is. Raises QueryError for an unknown one, with the nearest known."""
    if name not in COLUMNS:
        raise QueryError(f"there is no column {name!r}{_nearest(name)}; the columns are {', '.join(COLUMNS)}")
    return name


class _Reader:
    """Reads one condition from left to right, one token ahead."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split()
        self._at = 0
        self._depth = 0

    def condition(self) -> ColumnElement[bool]:
        read = self._either()
        if self._next.kind != "end":
            raise self._error("expected `and`, `or` or the end")
        return read

    def _either(self) -> ColumnElement[bool]:
        parts = [self._both()]
        while self._take("or"):
            parts.append(self._both())
        return or_(*parts)

    def _both(self) -> ColumnElement[bool]:
        parts = [self._single()]
        while self._take("and"):
            parts.append(self._single())
        return and_(*parts)

    def _single(self) -> ColumnElement[bool]:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._error(f"expected at most {DEEPEST} levels of nesting")
        if self._take("not"):
            read = not_(self._single())
        elif self._take("("):
            read = self._either()
            self._expect(")")
        else:
            read = self._comparison()
        self._depth -= 1
        return read

    def _comparison(self) -> ColumnElement[bool]:
        left = self._operand()
        negated = self._take("not")
        if self._next.word in ("in", "like"):
            read = self._in(left) if self._take("in") else self._like(left)
            return not_(read) if negated else read
        if negated:
            raise self._error("expected `in` or `like` after `not`")
        if self._take("is"):
            return self._is(left)
        if self._next.text not in _COMPARISONS:
            if left.column is not None and left.kind == "truth":
                return left.column.is_(True)
            raise self._error("expected a comparison, such as `<`, `=`, `in`, `like` or `is none`")
        parts = []
        while self._next.text in _COMPARISONS:
            sign = self._step()
            right = self._operand(bare=True)
            parts.append(self._compare(sign, left, right))
            left = right
        return and_(*parts)

    def _compare(self, sign: _Token, left: _Operand, right: _Operand) -> ColumnElement[bool]:
        values = self._value_like(right, left), self._value_like(left, right)
        if sign.text in ("=", "==", "!=", "<>"):
            for column, other in ((left, right), (right, left)):
                if column.column is not None and column.column.name == "digest" and other.column is None:
                    same = column.column.startswith(str(other.value), autoescape=True)
                    return same if sign.text in ("=", "==") else not_(same)
        return _COMPARISONS[sign.text](*values)

    def _in(self, left: _Operand) -> ColumnElement[bool]:
        if self._next.word == "mixers" and left.column is None:
            self._step()
            padded = literal(" ") + trials.c.mixers + literal(" ")
            return padded.contains(f" {left.value} ", autoescape=True)
        self._expect("(")
        values = []
        while not self._take(")"):
            value = self._operand(bare=True)
            values.append(self._value_like(left, value))
            if self._next.text != ")":
                self._expect(",")
        return _sql(left).in_(values) if values else false()

    def _like(self, left: _Operand) -> ColumnElement[bool]:
        self._take("like")
        pattern = self._operand()
        for operand in (left, pattern):
            if operand.kind != "text":
                raise self._error("expected texts beside `like`", operand.token)
        return _sql(left).like(_sql(pattern))

    def _is(self, left: _Operand) -> ColumnElement[bool]:
        negated = self._take("not")
        if self._next.word in ("true", "false") and left.kind == "truth":
            read = _sql(left).is_(self._step().word == "true")
        elif self._next.word in ("none", "null"):
            self._step()
            read = _sql(left).is_(None)
        else:
            raise self._error("expected `none` after `is`")
        return not_(read) if negated else read

    def _operand(self, *, bare: bool = False) -> _Operand:
        """A column or a value. `bare`: a word that is no column is a text, as in `outcome = ok`."""
        token = self._step()
        if token.kind == "number":
            value = float(token.text)
            if not math.isfinite(value):
                raise self._error("expected a number that fits", token)
            return _Operand(token, None, int(token.text) if _WHOLE.fullmatch(token.text) else value)
        if token.kind == "string":
            return _Operand(token, None, token.text[1:-1])
        if token.word in ("true", "false"):
            return _Operand(token, None, token.word == "true")
        if token.kind == "word" and token.text in COLUMNS:
            return _Operand(token, trials.c[token.text], None)
        if token.kind == "word" and token.word not in _WORDS:
            if bare or self._next.word == "in":
                return _Operand(token, None, token.text)
            raise self._error(f"there is no column {token.text!r}{_nearest(token.text)}", token)
        raise self._error("expected a column or a value", token)

    def _value_like(self, other: _Operand, operand: _Operand) -> ColumnElement[object]:
        """The operand as SQL, where it can be compared with the other one."""
        if operand.kind == other.kind:
            return _sql(operand)
        if other.kind == "time" and isinstance(operand.value, str):
            try:
                return literal(datetime.fromisoformat(operand.value), Instant())
            except ValueError:
                raise self._error("expected a time, such as '2026-01-31 12:00'", operand.token) from None
        if operand.kind == "time" and isinstance(other.value, str):
            return _sql(operand)
        said = operand if operand.column is None else other
        hint = _nearest(said.token.text) if said.token.kind == "word" and said.kind == "text" else ""
        raise self._error(f"a {operand.kind} cannot be compared with a {other.kind}{hint}", said.token)

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _step(self) -> _Token:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _take(self, text: str) -> bool:
        if self._next.word == text or (self._next.kind == "sign" and self._next.text == text):
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise self._error(f"expected `{text}`")

    def _split(self) -> list[_Token]:
        tokens, at = [], 0
        end = len(self._text.rstrip())
        while at < end:
            found = _TOKEN.match(self._text, at)
            if found is None or found.lastgroup is None:
                start = at + len(self._text[at:]) - len(self._text[at:].lstrip())
                raise self._error("this cannot be read", _Token("end", "", start))
            kind = found.lastgroup
            tokens.append(_Token(kind, found[kind], found.start(kind)))
            at = found.end()
        return [*tokens, _Token("end", "", end)]

    def _error(self, message: str, token: _Token | None = None) -> QueryError:
        at = (token or self._next).column
        # Long conditions are shown around the place.
        start = max(0, at - 60)
        shown = "".join(letter if letter.isprintable() else " " for letter in self._text[start : start + 120])
        return QueryError(f"{message}\n    {shown}\n    {' ' * (at - start)}^ column {at + 1}")


def _sql(operand: _Operand) -> ColumnElement[object]:
    return literal(operand.value) if operand.column is None else operand.column


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), COLUMNS, n=1)
    return f"; did you mean {close[0]}?" if close else ""
