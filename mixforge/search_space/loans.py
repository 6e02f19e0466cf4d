"""What one layer owns and later layers read: who lends, who borrows, and whether they fit.

A mixer lends and borrows by name: `cache`, the keys and values of all tokens so far (Sun et al. 2024, arXiv
2405.05254, whose cross-decoder layers all read one cache); `values`, those of the tokens of this pass; `experts`,
weights. A reader reads what the nearest owner of that name below it lends. `context` is what the branches beside a
reader say that read none: it has no owner but them, and nobody else reads it. `embedding`, that of the tokens of this
pass, the model itself lends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mixforge.search_space.mixer import Loan, Mixer
from mixforge.search_space.spelling import spell_mixer
from mixforge.search_space.stack import Beside, Layer, Residual, Reuse, Segment, Unit, mixers

Place = tuple[int, ...]
"""Of a mixer in a stack: the index of its unit, of each unit inside a reused one, and of its branch."""


def trades(unit: Unit, width: int) -> bool:
    """Whether a mixer in it lends or borrows."""
    if isinstance(unit, Layer):
        return bool(unit.mixer.lends(width) or unit.mixer.borrows(width))
    return any(mixer.lends(width) or mixer.borrows(width) for mixer in mixers((unit,)))


def borrows(unit: Unit, width: int) -> bool:
    """Whether a mixer in it borrows."""
    if isinstance(unit, Layer):
        return bool(unit.mixer.borrows(width))
    return any(mixer.borrows(width) for mixer in mixers((unit,)))


@dataclass(frozen=True, slots=True)
class Application:
    """A mixer where it is applied: its place, the place of the segment that it is in, and the branches beside it."""

    place: Place
    mixer: Mixer
    segment: Place = ()
    beside: tuple[Mixer, ...] = ()


def applications(units: tuple[Unit, ...], place: Place = (), segment: Place = ()) -> Iterator[Application]:
    """Mixers in the order in which they are applied; repeated applications at most twice."""
    for index, unit in enumerate(units):
        match unit:
            case Layer():
                yield Application((*place, index, 0), unit.mixer, segment)
            case Beside():
                for branch, mixer in enumerate(unit.branches):
                    others = unit.branches[:branch] + unit.branches[branch + 1 :]
                    yield Application((*place, index, branch), mixer, segment, others)
            case Reuse():
                for _ in range(min(unit.times, 2)):
                    yield from applications(unit.body, (*place, index), segment)
            case Segment():
                yield from applications(unit.body, (*place, index), (*place, index))
            case Residual():
                yield from applications(unit.body, (*place, index), segment)


def unread(units: tuple[Unit, ...], width: int) -> dict[Place, frozenset[str]]:
    """The places of owners, and what of theirs no layer reads before the next owner of that name."""
    idle: dict[Place, set[str]] = {}
    read: set[tuple[Place, str]] = set()
    last: dict[tuple[Place, str], Place] = {}
    for each in applications(units):
        seen = [(each.segment, name) for name in each.mixer.borrows(width)]
        read |= {(last[key], key[1]) for key in seen if key in last}
        for name in each.mixer.lends(width):
            idle.setdefault(each.place, set()).add(name)
            last[each.segment, name] = each.place
    found = {
        place: frozenset(name for name in names if (place, name) not in read) for place, names in idle.items()
    }
    return {place: names for place, names in found.items() if names}


def why_unowned(units: tuple[Unit, ...], width: int) -> str | None:
    """A sentence on the first reader without a fitting owner before it; None where all fit."""
    owners: dict[tuple[Place, str], Application] = {}
    for each in applications(units):
        for name, loan in each.mixer.borrows(width).items():
            if name == "context":
                reason = _why_alone(each, width)
            elif name == EMBEDDING:
                reason = _NO_EMBEDDING if each.segment else None
            else:
                reason = _why_unfit(name, loan, owners.get((each.segment, name)), each, width)
            if reason is not None:
                return f"layer {each.place[0] + 1}: {spell_mixer(each.mixer, width)} {reason}"
        owners |= dict.fromkeys([(each.segment, name) for name in each.mixer.lends(width)], each)
    return None


EMBEDDING = "embedding"
"""What the model itself lends."""

_NO_EMBEDDING = "reads embeddings, which the memory tokens of a segment have not; put it outside the segment"

# What to write where a reader has no owner.
_REMEDIES = {
    "cache": "put an owner such as attn(kv=own) there",
    "values": "put an owner, the same mixer with values=own, there",
    "experts": "put an owner, the same mixer with weights=own, there",
}


_NOUNS = {"cache": "a shared cache", "values": "shared values", "experts": "shared experts"}


def _why_alone(reader: Application, width: int) -> str | None:
    if any("context" not in other.borrows(width) for other in reader.beside):
        return None
    return (
        "reads what branches beside it say that read no context, and there is none; "
        "put it beside a mixer, as in attn(source=both) | mamba2"
    )


def _why_unfit(
    name: str, needed: Loan, owner: Application | None, reader: Application, width: int
) -> str | None:
    if owner is None:
        where = "no layer before it in its segment" if reader.segment else "no layer before it"
        return f"reads {_NOUNS[name]} that {where} owns; {_REMEDIES[name]}"
    if owner.place[:-1] == reader.place[:-1] and owner.place != reader.place:
        return f"cannot read the {name} of a mixer beside it; put the owner in a layer before it"
    lent = owner.mixer.lends(width)[name]
    if lent == needed:
        return None
    if lent.shapes == needed.shapes:
        turns = [each.turn or "no turn" for each in (needed, lent)]
        return (
            f"reads {_NOUNS[name]} with {turns[0]}, but {spell_mixer(owner.mixer, width)} before it owns one with "
            f"{turns[1]}; give both the same position"
        )
    each = "" if needed.extent == "weights" else " a token"
    return (
        f"reads {_NOUNS[name]} of {needed}{each}, but {spell_mixer(owner.mixer, width)} before it owns {lent}; "
        f"give both the same sizes"
    )
