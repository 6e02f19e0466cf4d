"""A reader of plain texts: names, numbers without exponents, calls, brackets and the operators + * | @.

    lm(6 * (gdn + swiglu) + attn(window=1024, kv=gqa(2)) + swiglu, width=512)

Nearly every text that a search reads is of this kind. `plain` makes the tree that Python's own reader and the walk
over its nodes make (see `syntax`), in a third of their time, but for the places, and answers None for any other text,
a faulty one included: what is wrong with a text, and where, is said in one place.
"""

from __future__ import annotations

import re
from keyword import kwlist

from mixforge.search_space.expression import Apply, Expression, Name, Number, Operation, Symbol

# Of brackets.
DEEPEST_NESTING = 64

# Behind white space: a word, with its equals sign or opening bracket, and with its value and a comma where that is one
# word or number; or a number or sign. What is too long for a word or number ends as two of them, which are never a text.
# Nothing is tried a second time with fewer characters.
_WORD = "[A-Za-z_][A-Za-z0-9_]{0,63}+"
_NUMBER = r"[0-9]{1,9}(?:\.[0-9]{0,20})?|\.[0-9]{1,20}"
_SPACE = r"[ \t\r\n]*+"
_TOKENS = re.compile(
    rf"{_SPACE}(?:({_WORD})(?:{_SPACE}(=)(?:{_SPACE}({_WORD}|{_NUMBER}){_SPACE}(?:,|(?=\))))?|{_SPACE}(\())?"
    rf"|({_NUMBER}|\*\*|[^ \t\r\n]))"
)
_BINDING: dict[str, int] = {"|": 1, "+": 2, "*": 3, "@": 3}
_SYMBOLS: dict[str, Symbol] = {"|": "|", "+": "+", "*": "*", "@": "@"}
_PYTHON = frozenset(kwlist)
# Of a token: the word, its equals sign, its value, its bracket; or the number or sign.
_Token = tuple[str, str, str, str, str]
# Behind the last token; it is in no text.
_END = ("", "", "", "", "")


class _Other(Exception):
    """The text is not a plain one."""


def plain(text: str) -> Expression | None:
    """The tree of a text, without places."""
    reader = _Plain(_TOKENS.findall(text))
    try:
        tree = reader.chain(reader.operand(), 1)
    except _Other:
        return None
    return tree if reader.tokens[reader.index] is _END else None


class _Plain:
    """Tokens on their way to a tree."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = [*tokens, _END]
        self.index = 0
        self.depth = 0
        # Names and numbers by their text.
        self.atoms: dict[str, Expression] = {}

    def chain(self, left: Expression, least: int) -> Expression:
        """An operand with what operators that bind at least so strongly join to it; each groups to the left."""
        tokens = self.tokens
        while (binding := _BINDING.get(sign := tokens[self.index][4], 0)) >= least:
            self.index += 1
            right = self.operand()
            if _BINDING.get(tokens[self.index][4], 0) > binding:
                right = self.chain(right, binding + 1)
            # What Python computes itself.
            if type(left) is Number and type(right) is Number:
                raise _Other
            left = Operation(_SYMBOLS[sign], left, right)
        return left

    def operand(self) -> Expression:
        word, equals, _, bracket, sign = self.tokens[self.index]
        self.index += 1
        if word:
            if equals:
                raise _Other
            return self.call(word) if bracket else self.atoms.get(word) or self.atom(word)
        if sign == "(":
            self.enter()
            inside = self.chain(self.operand(), 1)
            if self.tokens[self.index][4] != ")":
                raise _Other
            self.index += 1
            self.depth -= 1
            return inside
        return self.atoms.get(sign) or self.atom(sign)

    def atom(self, token: str) -> Expression:
        """A name or a number that is met for the first time."""
        made: Expression
        if token.isidentifier() and token.isascii() and token not in _PYTHON:
            made = Name(token)
        # Whole numbers without leading zeros; 0 itself is one.
        elif token.isdecimal() and token.isascii() and (token[0] != "0" or token == "0"):
            made = Number(int(token))
        elif "." in token and token != ".":
            made = Number(float(token))
        else:
            raise _Other
        self.atoms[token] = made
        return made

    def call(self, function: str) -> Apply:
        """What stands behind the opening bracket."""
        self.enter()
        arguments: list[Expression] = []
        keywords: dict[str, Expression] = {}
        tokens, atoms = self.tokens, self.atoms
        while True:
            word, equals, value, _, sign = tokens[self.index]
            if equals:
                if word in keywords or word in _PYTHON:
                    raise _Other
                self.index += 1
                if value:
                    keywords[word] = atoms.get(value) or self.atom(value)
                    continue
                keywords[word] = self.chain(self.operand(), 1)
            elif sign == ")":
                break
            elif keywords:
                raise _Other
            else:
                arguments.append(self.chain(self.operand(), 1))
            sign = tokens[self.index][4]
            if sign == ",":
                self.index += 1
            elif sign != ")":
                raise _Other
        if function in _PYTHON:
            raise _Other
        self.index += 1
        self.depth -= 1
        return Apply(function, tuple(arguments), tuple(keywords.items()))

    def enter(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST_NESTING:
            raise _Other
