"""What can be said of an architecture, or of a space, before a device is touched.

For an architecture: whether it can be built and why not, whether it is causal, mixes tokens, keeps a residual
stream and finds an owner for each shared cache; its parameters and state against limits. All of it follows from the
text. `flow=True` also builds a small one and sends one gradient through it.

For a space: how many of some draws are candidates, why the others are not, which options never come to anything, and
how many of the refused can be repaired.
"""

from __future__ import annotations

import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.count import counted
from mixforge.search_space.derivation import Derivation
from mixforge.search_space.grammar import Rejection, Space, spell_size
from mixforge.search_space.legality import illegality
from mixforge.search_space.limits import Limit
from mixforge.search_space.loans import EMBEDDING, applications, unread
from mixforge.search_space.production import Overgrown
from mixforge.search_space.repair import repair

Severity = Literal["error", "warning", "note"]

DEEP_POST_NORM = 12
"""Residual units from which on post-norm stacks do not train without a warm-up (Xiong et al. 2020, arXiv
2002.04745)."""
FEW = 0.05
"""Rate of candidates below which a space is slow to draw from."""
ENOUGH = 20
"""Draws after which an option that was in no candidate is named."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    rule: str
    severity: Severity
    """`error`: it cannot be searched or built so. `warning`: it can, and it may be a mistake."""
    sentence: str


def lint(
    architecture: Architecture, limits: Sequence[Limit] = (), context: int = 2048, *, flow: bool = False
) -> tuple[Finding, ...]:
    """Everything that can be said before the device, errors first. `context`: tokens that costs are stated at.

    `flow`: also build it at a small width and send one gradient through it, which takes seconds where the others
    take none; an architecture with errors is not built.
    """
    found = [*_building(architecture), *_structure(architecture)]
    if not any(finding.severity == "error" for finding in found):
        found += [*_sizes(architecture, context), *_limits(architecture, limits)]
        if flow:
            found += _flow(architecture)
    return tuple(sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.severity)))


def _building(architecture: Architecture) -> Iterator[Finding]:
    whole = architecture.illegality()
    if whole is None:
        yield Finding("genes", "note", f"every mixer can be built at width {architecture.width}")
        return
    each = [illegality((unit,), architecture.width) for unit in dict.fromkeys(architecture.stack)]
    broken = [fault for fault in each if fault is not None and fault.fault in ("genes", "shares")]
    if not broken:
        yield Finding(whole.fault, "error", whole.sentence)
    for unit, fault in zip(dict.fromkeys(architecture.stack), each, strict=True):
        if fault in broken and fault is not None:
            number = architecture.stack.index(unit) + 1
            yield Finding(fault.fault, "error", f"layer {number}: {fault.sentence.removeprefix('layer 1: ')}")


def _structure(architecture: Architecture) -> Iterator[Finding]:
    placed = list(applications(architecture.stack))
    token = sum(1 for each in placed if each.mixer.kind == "token")
    if token:
        yield Finding(
            "token mixer", "note", f"tokens are mixed by {token} of {counted(len(placed), 'mixer')}"
        )
    ahead = architecture.prefix
    together = (
        f", but for the first {ahead}, which are read together: no prediction of them counts" if ahead else ""
    )
    yield Finding(
        "causality",
        "note",
        f"causal by construction: each mixer of the catalogue reads tokens up to its own alone{together}; contract tests "
        "hold that over all of their genes",
    )
    if architecture.place == "none":
        yield Finding(
            "residual", "warning", "place=none leaves no norm beside the residual stream; try place=pre"
        )
    elif architecture.place == "post" and architecture.depth > DEEP_POST_NORM:
        yield Finding(
            "residual",
            "warning",
            f"place=post with {architecture.depth} residual units: past {DEEP_POST_NORM} such stacks diverge "
            "without a warm-up; try place=pre or place=sandwich",
        )
    else:
        yield Finding(
            "residual",
            "note",
            f"each mixer stands in a residual with its norm (place={architecture.place} where it says no other)",
        )
    width = architecture.width
    reads = [set(each.mixer.borrows(width)) for each in placed]
    beside = sum("context" in names for names in reads)
    if beside:
        yield Finding("sharing", "note", f"mixers that read what the branches beside them say: {beside}")
    readers = sum(1 for names in reads if names - {"context", EMBEDDING})
    if readers:
        lenders = {each.place: set(each.mixer.lends(width)) for each in placed if each.mixer.lends(width)}
        idle = unread(architecture.stack, width)
        read = sum(1 for place, names in lenders.items() if names - idle.get(place, frozenset()))
        yield Finding(
            "sharing", "note", f"what {counted(read, 'owner')} lent is read by {counted(readers, 'mixer')}"
        )


def _sizes(architecture: Architecture, context: int) -> Iterator[Finding]:
    cost, longer = architecture.cost(context), architecture.cost(2 * context)
    grows = (longer.state_bytes - cost.state_bytes) / context
    yield Finding("params", "note", f"{cost.params} parameters")
    yield Finding(
        "state",
        "note",
        f"{counted(cost.state_bytes, 'byte')} of state after {counted(context, 'token')}, then "
        + (f"{grows:g} more for each token" if grows else "no more however long the context is"),
    )


def _limits(architecture: Architecture, limits: Sequence[Limit]) -> Iterator[Finding]:
    for limit in limits:
        broken = limit.why_broken(architecture)
        if broken is not None:
            yield Finding("limits", "error", broken)
    if limits and not any(limit.why_broken(architecture) for limit in limits):
        yield Finding("limits", "note", f"keeps to {', '.join(map(str, limits))}")


def _flow(architecture: Architecture) -> Iterator[Finding]:
    # The probe builds a model, which needs torch; nothing else here loads it.
    from mixforge.search_space.probe import probe

    flow = probe(architecture)
    if not flow.is_finite:
        yield Finding(
            "gradient", "error", "one training step of a small one gives figures that are not finite"
        )
        return
    if not flow.is_causal:
        yield Finding("causality", "error", "a later token changes the logits of an earlier one")
    if flow.dead:
        names = ", ".join(flow.dead[:3]) + (f" and {len(flow.dead) - 3} more" if len(flow.dead) > 3 else "")
        yield Finding(
            "gradient", "warning", f"no gradient reaches {counted(len(flow.dead), 'weight')}: {names}"
        )
    sentence = (
        f"the gradient after the first unit is {flow.ratio:.2g} times that after the last (width {flow.width}, "
        f"{flow.length} tokens)"
    )
    if flow.ratio < 1e-3:
        yield Finding("gradient", "warning", f"vanishing: {sentence}")
    elif flow.ratio > 1e3:
        yield Finding("gradient", "warning", f"exploding: {sentence}")
    else:
        yield Finding(
            "gradient", "note", f"it reaches every weight: {sentence}" if not flow.dead else sentence
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What became of some draws from a space."""

    sentences: int | None
    """In the whole space; None where there are more than can be counted."""
    drawn: int
    admitted: int
    distinct: int
    """Different architectures among those admitted."""
    rejected: dict[str, int]
    """Kind to how often, most often first."""
    examples: dict[str, str]
    """Kind to the first reason."""
    repaired: int
    changes: tuple[int, ...]
    """Edits of each repair."""
    tried: int
    """Refused sentences that were given to the repair."""
    barren: tuple[tuple[str, str, int], ...]
    """Places and options that were drawn ENOUGH times and never in a candidate, with how often they were drawn."""

    @property
    def rate(self) -> float:
        """The share of draws that are candidates."""
        return self.admitted / self.drawn


def survey(space: Space, rng: random.Random, draws: int = 200, repairs: int = 0) -> Survey:
    """Draw from a space and count: what is a candidate, what is not and why. The first `repairs` refused sentences
    are repaired."""
    if draws < 1:
        raise ValueError(f"draws {draws} is not a number from 1 up")
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    options: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    digests: list[str] = []
    refused: list[Derivation] = []
    for _ in range(draws):
        try:
            derivation = space.draw(rng)
        except Overgrown as error:
            rejected["too many decisions"] += 1
            examples.setdefault("too many decisions", str(error))
            continue
        found = space.admit(derivation)
        if isinstance(found, Rejection):
            rejected[found.kind] += 1
            examples.setdefault(found.kind, found.reason)
            refused.append(derivation)
        else:
            digests.append(found.digest)
        for place in {(_COPY.sub("", choice.name), choice.taken) for choice in derivation.choices}:
            options[place][0] += 1
            options[place][1] += isinstance(found, Architecture)
    mended = [repair(space, derivation, rng) for derivation in refused[:repairs]]
    return Survey(
        sentences=_count(space),
        drawn=draws,
        admitted=len(digests),
        distinct=len(set(digests)),
        rejected=dict(rejected.most_common()),
        examples=examples,
        repaired=sum(1 for each in mended if each is not None),
        changes=tuple(each.changes for each in mended if each is not None),
        tried=len(mended),
        barren=tuple(
            (place, option, drawn)
            for (place, option), (drawn, admitted) in options.items()
            if drawn >= ENOUGH and not admitted and digests
        ),
    )


_COPY = re.compile(r"\[\d+\]")


def _count(space: Space) -> int | None:
    try:
        return space.count()
    except ValueError:
        return None


def lint_space(found: Survey) -> tuple[Finding, ...]:
    """A survey in sentences."""
    size = "more sentences than can be counted"
    if found.sentences is not None:
        size = counted(found.sentences, "sentence", spell_size(found.sentences))
    severity: Severity = "error" if not found.admitted else "warning" if found.rate < FEW else "note"
    findings = [
        Finding("size", "note", f"the space has {size}"),
        Finding(
            "rate",
            severity,
            f"{found.admitted} of {counted(found.drawn, 'draw')} gave candidates ({found.rate:.0%})",
        ),
    ]
    findings += [
        Finding("reason", "note", f"{count} x {kind} ({found.examples[kind]})")
        for kind, count in found.rejected.items()
    ]
    if found.admitted and found.distinct < found.admitted / 2:
        findings.append(
            Finding(
                "duplicates",
                "warning",
                f"only {counted(found.distinct, 'different architecture')} among {found.admitted} candidates",
            )
        )
    findings += [
        Finding("option", "warning", f"{place}: {option} was drawn {drawn} times and never in a candidate")
        for place, option, drawn in found.barren
    ]
    if found.tried:
        median = statistics.median(found.changes) if found.changes else 0
        by = f", by {counted(median, 'edit', f'{median:g}')} on the median" if found.changes else ""
        findings.append(
            Finding(
                "repair",
                "note",
                f"{found.repaired} of {counted(found.tried, 'refused sentence')} could be repaired{by}",
            )
        )
    return tuple(findings)
