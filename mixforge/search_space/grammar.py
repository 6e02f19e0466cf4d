"""A search space: a grammar of architecture expressions, and the limits that its architectures keep to.

    start = "lm(stack, width=any(128, 192, 256))"
    [rules]
    stack = "any(1, 2, 3) * (3 * (recurrent + swiglu) + attn(window=any(none, 64)) + swiglu)"
    recurrent = "any({gdn: 3, mamba2: 1})"

`any(a, b)` is a choice and `any({a: 3, b: 1})` a weighted one, wherever a value or a layer may stand. A name
is a rule (but a gene's own value comes before a rule of the same name). `n * rule` draws once and copies; `n
** rule` draws n times, each anew. Rules may recur. So that every sentence ends, at most `recursion` rules
that can come up again inside themselves are entered within one another; options that would need more are not
offered there. That bound is part of the space: draws, counts, listings and membership all mean the sentences
within it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.derivation import Derivation, Node
from mixforge.search_space.limits import Limit, read_limits
from mixforge.search_space.membership import find
from mixforge.search_space.notation import TooDeep, interpret
from mixforge.search_space.production import MOST_DECISIONS, Choose, Growth, Overgrown, Sentence
from mixforge.search_space.productions import Enter
from mixforge.search_space.published import with_published
from mixforge.search_space.rules import compile_rules, described
from mixforge.search_space.syntax import Expression, NotationError, nearest, read_with_places

DEEPEST_RECURSION = 64


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a sentence is no candidate: a kind to count by, and a sentence with the numbers."""

    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A legal architecture within the limits, and what was drawn and rejected before it."""

    architecture: Architecture
    derivation: Derivation
    rejected: Mapping[str, int]
    """Kind of rejection to how often it came up."""


@dataclass(frozen=True, slots=True)
class Space:
    """A grammar and its limits. Raises ValueError for an unknown name, a rule that never ends, a sentence of
    nonsense."""

    start: Expression
    rules: tuple[tuple[str, Expression], ...] = ()
    limits: tuple[Limit, ...] = ()
    recursion: int = 16
    """How many recursive rules are entered within one another at most."""
    _entry: Enter = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.recursion <= DEEPEST_RECURSION:
            raise ValueError(
                f"space.recursion {self.recursion} is not a whole number from 1 to {DEEPEST_RECURSION}"
            )
        entry = compile_rules(self.start, dict(self.rules))
        if entry.measure() > self.recursion:
            raise ValueError(
                f"the shortest sentence enters {entry.measure():.0f} recursive rules within one another, "
                f"and space.recursion is {self.recursion}; raise it"
            )
        try:
            entry.longest(self.recursion)
        except RecursionError:
            raise ValueError(
                f"the rules are nested too deeply; lower space.recursion (now {self.recursion})"
            ) from None
        object.__setattr__(self, "_entry", entry)
        self._probe()

    @staticmethod
    def from_text(text: str) -> Space:
        """A space without rules or limits: `lm(6 ** any(attn, swiglu), width=128)`."""
        return Space(_read("start", text))

    @staticmethod
    def from_table(table: Mapping[str, object]) -> Space:
        """The space of a `[space]` table: `start`, `rules`, `limits`, `recursion`; or `published` and what is
        changed of it. Raises ValueError."""
        known = ("start", "rules", "limits", "recursion", "published")
        for key in table:
            if key not in known:
                raise ValueError(
                    f"space: unknown key '{key}'{nearest(key, known)} (there are {', '.join(known)})"
                )
        table = with_published(table)
        if "start" not in table:
            raise ValueError('space has no start; write one, such as start = "lm(stack, width=128)"')
        rules = _table(table, "rules")
        recursion = table.get("recursion", 16)
        if not isinstance(recursion, int) or isinstance(recursion, bool):
            raise ValueError(
                f"space.recursion {recursion!r} is not a whole number from 1 to {DEEPEST_RECURSION}"
            )
        return Space(
            start=_read("start", table["start"]),
            rules=tuple((name, _read(name, text)) for name, text in rules.items()),
            limits=read_limits(_table(table, "limits")),
            recursion=recursion,
        )

    @staticmethod
    def published(name: str) -> Space:
        """A published space, such as `composer`. Raises ValueError for an unknown name."""
        return Space.from_table({"published": name})

    def derive(self, choose: Choose) -> Derivation:
        """One sentence, each choice answered by `choose(name, options, weights) -> index`.

        A name always comes with the same options, and comes up at most once in a derivation. Raises
        Overgrown (a ValueError) where the sentence takes more than MOST_DECISIONS decisions.
        """
        return self._grow(Growth(choose))

    def _grow(self, growth: Growth) -> Derivation:
        nodes: list[Node] = []
        try:
            expression = self._entry.grow("", self.recursion, growth, nodes)
        except RecursionError:
            raise Overgrown from None
        return Derivation(nodes[0], expression)

    def draw(self, rng: random.Random) -> Derivation:
        """One sentence, each choice by its weights. It may be illegal or over a limit; see `draw_legal`."""
        return self.derive(weighted(rng))

    def sentence(self, number: int) -> Derivation:
        """The sentence of this number, as `enumerate` lists them: 0 is the first, `count() - 1` the last.

        Raises IndexError for any other number, Overgrown where it takes more than MOST_DECISIONS decisions.
        """
        total = self.count()
        if not 0 <= number < total:
            raise IndexError(f"sentence {number} is not one of the {spell_size(total)} that the space has")
        answers = self._entry.answers(number, self.recursion)
        return self.derive(lambda name, options, weights: next(answers))

    def draw_uniform(self, rng: random.Random) -> Derivation:
        """One sentence, each as likely as any other: weights are not asked. See `sentence` and `count`."""
        return self.sentence(rng.randrange(self.count()))

    def replay(
        self, picks: Mapping[str, str], otherwise: Choose, parent: Derivation | None = None
    ) -> Derivation:
        """The sentence with these picks, as `Derivation.picks` has them; what they do not answer,
        `otherwise` does.

        With a part of the picks of one derivation left out, or put under another path, this regrows that
        part. What a `parent` of this space decided the same way is taken from it, which changes nothing but the
        time it takes.
        """

        def choose(name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
            taken = picks.get(name)
            return options.index(taken) if taken in options else otherwise(name, options, weights)

        return self._grow(Growth(choose, kept={} if parent is None else _unchanged(parent, picks)))

    def admit(self, derivation: Derivation) -> Architecture | Rejection:
        """The derivation's architecture, or the first thing that rules it out: its meaning, legality, then
        limits."""
        try:
            architecture = derivation.architecture
        except TooDeep as error:
            return Rejection("too many layers", error.message)
        except NotationError as error:
            return Rejection("no meaning", error.message)
        illegality = architecture.illegality()
        if illegality is not None:
            return Rejection(f"illegal: {illegality.fault}", illegality.sentence)
        for limit in self.limits:
            broken = limit.why_broken(architecture)
            if broken is not None:
                return Rejection(f"limit: {limit}", broken)
        return architecture

    def draw_legal(self, rng: random.Random, attempts: int = 5_000) -> Drawn:
        """Draw until a sentence is legal and within the limits.

        Raises ValueError, with the kinds of rejection counted, where none of the attempts is.
        """
        rejected: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for _ in range(attempts):
            found = self._attempt(rng)
            if isinstance(found, Drawn):
                return Drawn(
                    architecture=found.architecture, derivation=found.derivation, rejected=dict(rejected)
                )
            rejected[found.kind] += 1
            examples.setdefault(found.kind, found.reason)
        counts = "\n".join(f"  {count} x {kind} ({examples[kind]})" for kind, count in rejected.most_common())
        raise ValueError(
            f"none of {attempts} sentences drawn from the space is legal and within its limits:\n{counts}\n"
            "loosen a limit, or change the rules"
        )

    def _attempt(self, rng: random.Random) -> Drawn | Rejection:
        try:
            derivation = self.draw(rng)
        except Overgrown as error:
            return Rejection("too many decisions", str(error))
        found = self.admit(derivation)
        if isinstance(found, Rejection):
            return found
        return Drawn(architecture=found, derivation=derivation, rejected={})

    def count(self) -> int:
        """How many sentences there are: exactly, and by derivations. Two that mean the same model count
        twice.

        Neither legality nor limits are asked. Raises ValueError past 2 ** 1000000. See `distinct`.
        """
        return self._entry.count(self.recursion)

    def enumerate(self) -> Iterator[Derivation]:
        """Every sentence once, lazily, in the order of the text: the last choice changes first.

        Raises ValueError where a sentence can take more than MOST_DECISIONS decisions.
        """
        longest = self._entry.longest(self.recursion)
        if longest > MOST_DECISIONS:
            raise ValueError(
                f"a sentence of this space can take {spell_size(longest)} decisions, too many to list; "
                f"lower space.recursion (now {self.recursion})"
            )
        return map(_as_derivation, self._entry.sentences("", self.recursion))

    def distinct(self, most: int = 100_000) -> int:
        """How many different architectures are legal and within the limits, by listing every sentence.

        Raises ValueError where there are more than `most` sentences.
        """
        sentences = self.count()
        if sentences > most:
            raise ValueError(
                f"the space has {spell_size(sentences)} sentences, more than the {most} that are listed"
            )
        found = map(self.admit, self.enumerate())
        return len({each.digest for each in found if isinstance(each, Architecture)})

    def contains(self, architecture: Architecture) -> Derivation | None:
        """A derivation of an architecture equal to this one, or None. Limits are not asked.

        What counts is the canonical form, not the text. Two bounds hold. A residual unit whose text has more
        than 100,000 sentences raises ValueError. An owner of a shared cache that no layer reads is a plain layer;
        all owners are first taken as read, then each place takes the first option that fits either way. Where
        that puts an owner in front of a reader that must read an earlier one, the sentence is missed: list plain
        layers before owners in any(...).
        """
        for answers in find(self._entry, self.recursion, architecture):
            pending = iter(answers)
            derivation = self.derive(lambda name, options, weights, pending=pending: next(pending))  # type: ignore[misc]
            if derivation.architecture == architecture:
                return derivation
        return None

    def _probe(self) -> None:
        """Interpret a few sentences, the options least used so far first, so that nonsense in any option is
        found."""
        used: Counter[tuple[str, str]] = Counter()

        def choose(name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
            # The end of the path says which rule and which place in it; the way there does not matter here.
            place = _COPY.sub("", "/".join(name.split("/")[-2:]))
            index = min(range(len(options)), key=lambda index: used[place, options[index]])
            used[place, options[index]] += 1
            return index

        # It ends at 32 sentences in a row without an option that is new; one that overgrows counts for 8.
        idle = 0
        while idle < 32:
            before = len(used)
            try:
                derivation = self.derive(choose)
                interpret(derivation.expression)
                idle += 1
            except (TooDeep, Overgrown):
                idle += 8
            except NotationError as error:
                raise ValueError(
                    f"the space has a sentence without meaning: {error.message}\n    {derivation.expression}"
                ) from None
            if len(used) > before:
                idle = 0


_COPY = re.compile(r"\[\d+\]")


def weighted(rng: random.Random) -> Choose:
    """Answers drawn by the options' weights."""

    def choose(name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
        left = rng.random() * sum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return len(weights) - 1

    return choose


def spell_size(number: int) -> str:
    """A count that a person can read: digits up to a million, then a power of ten."""
    if number < 1_000_000:
        return str(number)
    # str of an integer has a bound of 4300 digits.
    digits = int(number.bit_length() * 0.30103)
    return f"about 10^{digits}"


def _unchanged(parent: Derivation, picks: Mapping[str, str]) -> dict[str, Node]:
    """The rules and copies of a derivation, outermost first, in which every choice is made as these picks say."""
    touched: set[str] = set()
    for name in [name for name, taken in parent.picks.items() if picks.get(name) != taken]:
        while name not in touched:
            touched.add(name)
            name = name.rpartition("/")[0]
    kept: dict[str, Node] = {}
    pending = [parent.root]
    while pending:
        node = pending.pop()
        if node.kind in ("rule", "recursive", "copy") and node.path not in touched:
            kept[node.path] = node
        else:
            pending += node.children
    return kept


def write_size(number: int) -> str:
    """A count with all of its digits; as `spell_size` where they are more than Python writes out."""
    return str(number) if number.bit_length() < 13_000 else spell_size(number)


def _as_derivation(sentence: Sentence) -> Derivation:
    expression, nodes = sentence
    return Derivation(nodes[0], expression)


def _read(name: str, text: object) -> Expression:
    if not isinstance(text, str):
        raise ValueError(f"{described(name)}: {text!r} is not a text; write an expression in quotes")
    try:
        return read_with_places(text)
    except NotationError as error:
        raise ValueError(f"{described(name)}: {error}") from None


def _table(table: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"space.{key}: {value!r} is not a table of texts")
    return value
