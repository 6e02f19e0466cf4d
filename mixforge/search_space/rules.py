"""The rules of a grammar, compiled together: endless ones are refused, recursive ones are marked."""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterator, Mapping

from mixforge.search_space.compiler import RESERVED, Compiler
from mixforge.search_space.notation import vocabulary
from mixforge.search_space.production import Production
from mixforge.search_space.productions import Copies, Enter, Fixed, Rule
from mixforge.search_space.syntax import Expression, NotationError, read_with_places

START = "start"
"""The name of the right-hand side that a sentence begins with."""

MOST_RULES = 256


def compile_rules(start: Expression, texts: Mapping[str, Expression]) -> Enter:
    """The start, entered, with every rule behind it compiled. Raises ValueError, naming the rule, for a bad
    one."""
    if len(texts) > MOST_RULES:
        raise ValueError(f"the space has {len(texts)} rules; at most {MOST_RULES} are read")
    for name in texts:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"space.rules: '{name[:80]}' is no name for a rule; use letters, digits and _")
        if name in {START, "any", *RESERVED, *vocabulary()}:
            raise ValueError(
                f"{described(name)}: '{name}' is a word of the notation; give the rule another name"
            )
    rules = {name: Rule(name, Fixed(expression)) for name, expression in texts.items()}
    first = Rule(START, Fixed(start))
    for rule, expression in [(first, start), *((rules[name], texts[name]) for name in texts)]:
        text = str(expression)
        try:
            # Read again, so that columns are those of the text that an error shows.
            rule.body = Compiler(rule.name, rules).compile(read_with_places(text), whole=rule is not first)
        except NotationError as error:
            raise ValueError(f"{described(rule.name)}: {error.within(text)}") from None
    everything = [first, *rules.values()]
    _mark_recursive(everything)
    _measure(everything)
    for rule in everything:
        _check_copies(rule)
    return Enter("", first)


def described(rule: str) -> str:
    """How an error names a right-hand side."""
    return "space.start" if rule == START else f"space.rules.{rule}"


def _inside(production: Production) -> Iterator[Production]:
    yield production
    for part in production.parts:
        yield from _inside(part)


def _entered(rule: Rule) -> list[Rule]:
    return [production.rule for production in _inside(rule.body) if isinstance(production, Enter)]


def _mark_recursive(rules: list[Rule]) -> None:
    for rule in rules:
        reached: set[str] = set()
        pending = _entered(rule)
        while pending:
            each = pending.pop()
            if each.name not in reached:
                reached.add(each.name)
                pending += _entered(each)
        rule.recursive = rule.name in reached


def _measure(rules: list[Rule]) -> None:
    """Heights, as the least fixpoint. Raises ValueError for a rule that has no finite sentence."""
    changed = True
    while changed:
        changed = False
        for rule in rules:
            for production in reversed(list(_inside(rule.body))):
                production.height = production.measure()
            height = rule.body.height + (1 if rule.recursive else 0)
            if height < rule.height:
                rule.height, changed = height, True
    endless = [rule for rule in rules if rule.height == math.inf]
    if endless:
        circle = _circle(endless[0])
        raise ValueError(
            f"{described(circle[0].name)} never ends: every sentence of it needs "
            + " -> ".join(rule.name for rule in circle)
            + "; give it an option that does not lead back, as in any(layer, layer + stack)"
        )


def _circle(rule: Rule) -> list[Rule]:
    """Rules without a finite sentence, each needing the next, the last being the first again."""
    way = [rule]
    while way.count(way[-1]) == 1:
        way.append(next(each for each in _entered(way[-1]) if each.height == math.inf))
    return way[way.index(way[-1]) :]


def _check_copies(rule: Rule) -> None:
    for production in _inside(rule.body):
        if isinstance(production, Copies):
            try:
                production.numbers(int(production.times.height))
            except ValueError as error:
                raise ValueError(f"{described(rule.name)}: {error}") from None
