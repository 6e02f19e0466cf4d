"""From the text of a right-hand side to a production: names resolved, places labelled.

A place is labelled by the words around it: `width` in lm(..., width=any(...)), `linear.decay` in
linear(decay=any(...)), `times` before `*`, `@` and `**`, the rule's name for a rule; the second such place
that can be reached in one pass through the text is `channel#2`. Places that exclude one another, in two
options of one choice, share a label where they offer the same: they are the same question in two lines of
the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from mixforge.search_space.architecture import CHOICES
from mixforge.search_space.mixers import CATALOGUE
from mixforge.search_space.notation import genes_of, vocabulary
from mixforge.search_space.production import Production
from mixforge.search_space.productions import (
    Applied,
    Copies,
    Enter,
    Fixed,
    Joined,
    Offer,
    Pick,
    Rule,
)
from mixforge.search_space.stack import FORMS
from mixforge.search_space.syntax import (
    Apply,
    Expression,
    Name,
    NotationError,
    Number,
    Operation,
    Table,
    nearest,
    operands,
)
from mixforge.search_space.words import names_of


@dataclass(frozen=True, slots=True)
class _Site:
    """What a label stands for within one right-hand side: two places with equal sites may share it."""

    kind: str
    content: tuple[Expression, ...]


@dataclass(slots=True)
class _Labels:
    """The labels of one right-hand side."""

    sites: dict[str, _Site] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    """How many places of a label lie before this point on one way through the text."""

    def take(self, words: str, site: _Site) -> str:
        """A label for the next place: these words, numbered from the second on."""
        number = self.passed.get(words, 0)
        while True:
            number += 1
            label = words if number == 1 else f"{words}#{number}"
            if self.sites.setdefault(label, site) == site:
                self.passed[words] = number
                return label


class Compiler:
    """One right-hand side on its way to a production."""

    def __init__(self, scope: str, rules: Mapping[str, Rule]) -> None:
        self.scope = scope
        self.rules = rules
        self.labels = _Labels()

    def compile(
        self,
        node: Expression,
        words: tuple[str, ...] = (),
        values: frozenset[str] | None = None,
        *,
        whole: bool = False,
    ) -> Production:
        """`words` are what stands around the node; `whole` says that it is the rule's whole text.

        `values` are the names that are legal at this place without being rules, where that is known.
        """
        match node:
            case Name():
                return self.name(node, words, values)
            case Number():
                return Fixed(node)
            case Table():
                raise NotationError(
                    "a table {...} stands only inside any(...), as in any({a: 3, b: 1})", node.column
                )
            case Apply(function="any"):
                return self.pick(node, words, values, whole)
            case Apply():
                return self.apply(node, words, values)
            case Operation(symbol="**"):
                return self.copies(node, words)
            case Operation():
                return self.chain(node, words)
        raise AssertionError(f"{type(node).__name__} is not an expression node")

    def name(self, node: Name, words: tuple[str, ...], values: frozenset[str] | None) -> Production:
        # A gene's own values come first: `channel` may be a rule and, in linear(decay=channel), a value.
        if values is not None and node.id in values:
            return Fixed(node)
        if node.id in self.rules:
            return Enter(self.place((*words, node.id), "rule", node), self.rules[node.id])
        if node.id == "any":
            raise NotationError("'any' needs its options, as in any(attn, swiglu)", node.column)
        known = known_words() if values is None else values
        if node.id not in known:
            hint = nearest(node.id, {*known, *self.rules})
            raise NotationError(f"'{node.id}' is neither a rule nor a word that fits here{hint}", node.column)
        return Fixed(node)

    def place(self, words: tuple[str, ...], kind: str, *content: Expression) -> str:
        return self.labels.take(".".join(words), _Site(kind, content))

    def apply(self, node: Apply, words: tuple[str, ...], values: frozenset[str] | None) -> Production:
        function = node.function
        if function in self.rules and (values is None or function not in values):
            raise NotationError(f"'{function}' is a rule, and a rule takes no arguments", node.column)
        known = known_words() if values is None else values
        if function not in known:
            hint = nearest(function, {*known, *self.rules})
            raise NotationError(f"'{function}' is no word that takes arguments here{hint}", node.column)
        # Everything is inside lm(...), so its name would tell nothing.
        around = words if function == "lm" else (*words, function)
        arguments = tuple(self.compile(argument, around) for argument in node.arguments)
        keywords = tuple(
            (name, self.compile(value, (*around, name), legal_names(function, name)))
            for name, value in node.keywords
        )
        if all(isinstance(part, Fixed) for part in (*arguments, *(value for _, value in keywords))):
            return Fixed(node)
        return Applied(function, arguments, keywords)

    def chain(self, node: Operation, words: tuple[str, ...]) -> Production:
        *before, last = operands(node, node.symbol)
        # The operands of + and | are parts of equal standing; * and @ have numbers before the last.
        counting = words if node.symbol in "+|" else (*words, "times")
        terms = (*(self.compile(term, counting) for term in before), self.compile(last, words))
        return Fixed(node) if all(isinstance(term, Fixed) for term in terms) else Joined(node.symbol, terms)

    def copies(self, node: Operation, words: tuple[str, ...]) -> Production:
        times = self.compile(node.left, (*words, "times"))
        body = node.right
        if isinstance(body, Name) and body.id in self.rules:
            label = self.place((*words, body.id), "copies", body)
            return Copies(label, f"{self.scope}:{label}", times, Enter("", self.rules[body.id]))
        label = self.place((*words, "copy"), "copies", body)
        inside = Compiler(f"{self.scope}.{label}", self.rules).compile(body, whole=True)
        return Copies(label, f"{self.scope}:{label}", times, inside)

    def pick(
        self, node: Apply, words: tuple[str, ...], values: frozenset[str] | None, whole: bool
    ) -> Production:
        options, weights = _options(node)
        texts = tuple(str(option) for option in options)
        for text in texts:
            if texts.count(text) > 1:
                raise NotationError(
                    f"any(...) has the option '{text}' twice; give it a weight instead", node.column
                )
        label = "" if whole else self.place(words or ("any",), "choice", *options)
        before = self.labels.passed
        after = dict(before)
        compiled: list[Production] = []
        for option in options:
            # Only one option is taken, so each counts its places from the same point.
            self.labels.passed = dict(before)
            compiled.append(self.compile(option, words, values))
            for place, number in self.labels.passed.items():
                after[place] = max(number, after.get(place, 0))
        self.labels.passed = after
        return Pick(label, f"{self.scope}:{label}", Offer(tuple(compiled), texts, weights))


RESERVED = frozenset({"lm", *FORMS})


@lru_cache(maxsize=1)
def known_words() -> frozenset[str]:
    """Every name that may stand in a rule without being one: mixers, aliases, `lm`, long forms and genes'
    values."""
    genes = (gene for mixer in CATALOGUE.values() for gene in genes_of(mixer).values())
    values = (name for gene in genes for name in names_of(gene))
    choices = (name for names in CHOICES.values() for name in names)
    words = (name for form in FORMS.values() for gene in form.values() for name in names_of(gene))
    return frozenset({*RESERVED, *words, *vocabulary(), *values, *choices})


@lru_cache(maxsize=4_096)
def legal_names(function: str, word: str) -> frozenset[str] | None:
    """The names that `word=` of this function takes; None where that cannot be told."""
    if function == "lm":
        return frozenset(CHOICES.get(word, ()))
    if function in FORMS:
        return frozenset(names_of(FORMS[function][word])) if word in FORMS[function] else frozenset()
    if function not in vocabulary():
        return None
    gene = genes_of(vocabulary()[function][0]).get(word)
    return None if gene is None else frozenset(names_of(gene))


def _options(node: Apply) -> tuple[tuple[Expression, ...], tuple[float, ...]]:
    """The options of any(a, b) or any({a: 3, b: 1}) and their weights."""
    if node.keywords:
        raise NotationError(f"any(...) takes options, not '{node.keywords[0][0]}='", node.column)
    if len(node.arguments) == 1 and isinstance(node.arguments[0], Table):
        pairs = node.arguments[0].pairs
    else:
        pairs = tuple((option, Number(1)) for option in node.arguments)
    if not pairs:
        raise NotationError("any(...) has no options; expected some, as in any(attn, swiglu)", node.column)
    weights: list[float] = []
    for option, weight in pairs:
        if not isinstance(weight, Number) or not weight.value > 0:
            raise NotationError(
                f"the weight of '{option}' is '{weight}'; expected a number above 0", weight.column
            )
        weights.append(float(weight.value))
    return tuple(option for option, _ in pairs), tuple(weights)
