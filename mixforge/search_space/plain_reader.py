"""A reader of plain texts: names, numbers without exponents, calls, brackets and the operators + * | @.

    lm(6 * (gdn + swiglu) + attn(window=1024, kv=gqa(2)) + swiglu, width=512)

Nearly every text that a search reads is of this kind. `plain` makes the tree that Python's own reader and the walk
over its nodes make (see `syntax`), in less than half of their time, and answers None for any other text, a faulty one
included: what is wrong with a text is said in one place.
"""

from __future__ import annotations

import re
from itertools import accumulate, compress
from keyword import kwlist

from mixforge.search_space.expression import Apply, Expression, Name, Number, Operation, Symbol

_TOKENS = re.compile(r"[ \t\r\n]+|[A-Za-z_][A-Za-z0-9_]*|[0-9.][A-Za-z0-9_.]*|\*\*|.")
_BINDING: dict[str, int] = {"|": 1, "+": 2, "*": 3, "@": 3}
_SYMBOLS: dict[str, Symbol] = {"|": "|", "+": "+", "*": "*", "@": "@"}
_PYTHON = frozenset(kwlist)
# Behind a value that is one token.
_CLOSING = frozenset(",)")
# Behind the last token.
_END = ""


class _Other(Exception):
    """The text is not a plain one."""


def plain(text: str) -> Expression | None:
    """The tree of a text of known characters that is nested no deeper than `syntax` allows."""
    tokens = _TOKENS.findall(text)
    if not _PYTHON.isdisjoint(tokens):
        return None
    # Every known character but white space is at or behind the exclamation mark.
    kept = list(map("!".__le__, tokens))
    places = compress(accumulate(map(len, tokens), initial=0), kept)
    reader = _Plain(list(compress(tokens, kept)), list(places))
    try:
        tree = reader.chain(1)
    except _Other:
        return None
    return tree if reader.tokens[reader.index] == _END else None


class _Plain:
    """Tokens on their way to a tree."""

    def __init__(self, tokens: list[str], places: list[int]) -> None:
        # Two: behind a word and its sign the token after the next is looked at.
        self.tokens = [*tokens, _END, _END]
        self.places = [*places, 0, 0]
        self.index = 0

    def chain(self, least: int) -> Expression:
        """Operands and the operators between them that bind at least so strongly; each groups to the left."""
        left = self.operand()
        while (binding := _BINDING.get(self.tokens[self.index], 0)) >= least:
            symbol = _SYMBOLS[self.tokens[self.index]]
            self.index += 1
            right = self.chain(binding + 1)
            # What Python computes itself.
            if type(left) is Number and type(right) is Number:
                raise _Other
            left = Operation(symbol, left, right, left.column)
        return left

    def operand(self) -> Expression:
        token, place = self.tokens[self.index], self.places[self.index]
        self.index += 1
        if token.isidentifier():
            if self.tokens[self.index] != "(":
                return Name(token, place)
            self.index += 1
            return self.call(token, place)
        # Whole numbers without leading zeros; 0 itself is one.
        if token.isdecimal() and (token[0] != "0" or token == "0"):
            return Number(int(token), place)
        if "." in token and token.replace(".", "", 1).isdecimal():
            return Number(float(token), place)
        if token == "(":
            inside = self.chain(1)
            self.close()
            return inside
        raise _Other

    def call(self, function: str, place: int) -> Apply:
        """What stands behind the opening bracket."""
        arguments: list[Expression] = []
        keywords: dict[str, Expression] = {}
        columns: list[int] = []
        tokens = self.tokens
        while tokens[self.index] != ")":
            word = tokens[self.index]
            # The token after the last one is the end, behind which nothing is asked.
            if word.isidentifier() and tokens[self.index + 1] == "=":
                if word in keywords:
                    raise _Other
                columns.append(self.places[self.index])
                self.index += 2
                keywords[word] = self.operand() if tokens[self.index + 1] in _CLOSING else self.chain(1)
            elif keywords:
                raise _Other
            else:
                arguments.append(self.chain(1))
            if tokens[self.index] == ",":
                self.index += 1
            elif tokens[self.index] != ")":
                raise _Other
        self.index += 1
        return Apply(function, tuple(arguments), tuple(keywords.items()), place, tuple(columns))

    def close(self) -> None:
        if self.tokens[self.index] != ")":
            raise _Other
        self.index += 1
