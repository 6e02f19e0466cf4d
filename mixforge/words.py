"""Every word of the notation as a Python name, so that an expression typed into Python is the text's
architecture.

    from mixforge.words import *
    lm(6 * (3 * (gdn + swiglu) + attn(window=1024) + swiglu), width=512)

A word is a node of the expression tree (`search_space.syntax`); `lm(...)` interprets the tree. Words that are
Python's own (`sum`) are left to Python, whose `sum` is understood as the word.
"""

from __future__ import annotations

import builtins
import keyword

from mixforge.search_space.architecture import CHOICES, Architecture
from mixforge.search_space.genes import genes_of
from mixforge.search_space.notation import interpret
from mixforge.search_space.stack import FORMS
from mixforge.search_space.syntax import Expression, Name, Operand, nearest
from mixforge.search_space.vocabulary import vocabulary
from mixforge.search_space.words import names_of


def lm(stack: Operand, **words: Operand) -> Architecture:
    """`lm(stack, width=..., ...)` as an architecture. Raises NotationError."""
    return interpret(Name("lm")(stack, **words))


def _words() -> set[str]:
    found = {"auto", *FORMS, *vocabulary(), *(name for names in CHOICES.values() for name in names)}
    for genes in (*FORMS.values(), *(genes_of(mixer) for mixer, _ in vocabulary().values())):
        for gene in genes.values():
            found |= set(names_of(gene))
    return {word for word in found if not keyword.iskeyword(word) and word not in dir(builtins)}


_WORDS = _words()
__all__ = ["lm", *sorted(_WORDS)]


def __getattr__(name: str) -> Expression:
    if name not in _WORDS:
        raise AttributeError(f"mixforge.words has no word '{name}'{nearest(name, _WORDS)}")
    return Name(name)
