"""When a stack is no model: genes that do not divide, no token mixer, a reader of what no layer owns."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mixforge.search_space.genes import Form
from mixforge.search_space.loans import borrows, why_unowned
from mixforge.search_space.settled import narrow, why_illegal
from mixforge.search_space.spelling import spell_mixer
from mixforge.search_space.stack import Beside, Layer, Residual, Reuse, Segment, Unit, mixers, mixes_tokens

Fault = Literal["genes", "shares", "no token mixer", "no owner", "segments", "norm"]


@dataclass(frozen=True, slots=True)
class Illegality:
    """Why an architecture cannot be a model: which rule it breaks, and a sentence with the numbers in it."""

    fault: Fault
    sentence: str


def illegality(units: tuple[Unit, ...], width: int, norm: str | Form = "rms") -> Illegality | None:
    """The first rule that a canonical stack breaks with this norm; None where it is a model."""
    distinct = dict.fromkeys(units)
    for unit in distinct:
        found = _unit_illegality(unit, width)
        if found is not None:
            return Illegality(found.fault, f"layer {units.index(unit) + 1}: {found.sentence}")
    if not any(map(mixes_tokens, units)):
        return Illegality(
            "no token mixer", "no layer mixes tokens, so no token sees another; add one such as attn"
        )
    if any(borrows(unit, width) for unit in distinct):
        sentence = why_unowned(units, width)
        if sentence is not None:
            return Illegality("no owner", sentence)
    if isinstance(norm, Form) and any(isinstance(unit, Reuse | Segment) for unit in distinct):
        return Illegality(
            "norm",
            f"norm={norm}: training takes the statistics of the batches before, so it is applied once in a pass; write "
            "layers in n @, reuse or segment out, or say norm=layer",
        )
    return None


def _unit_illegality(unit: Unit, width: int) -> Illegality | None:
    match unit:
        case Layer():
            reason = why_illegal(unit.mixer, width)
            return (
                None if reason is None else Illegality("genes", f"{spell_mixer(unit.mixer, width)}: {reason}")
            )
        case Beside():
            return _beside_illegality(unit, width)
        case Segment() if _segments(unit.body):
            return Illegality(
                "segments", "a segment inside a segment; one of them says where layers begin anew"
            )
        case Segment() if ahead := next((mixer for mixer in mixers(unit.body) if mixer.prefix), None):
            sentence = "its prefix is that of the sequence, and the layers of a segment begin anew with each"
            return Illegality(
                "segments", f"{spell_mixer(ahead, width)}: {sentence}; put it outside the segment"
            )
        case Reuse() | Segment() | Residual():
            found = next((found for each in unit.body if (found := _unit_illegality(each, width))), None)
            return found if isinstance(unit, Residual) else found or _carried_illegality(unit, width)


def _carried_illegality(unit: Reuse | Segment, width: int) -> Illegality | None:
    """What layers that are applied several times in a pass left last is of the present pass, later tokens included."""
    carrying = next((mixer for mixer in mixers(unit.body) if mixer.carries), None)
    if carrying is None:
        return None
    return Illegality(
        "genes",
        f"{spell_mixer(carrying, width)}: training goes on from the batch before, so it is applied once in a pass; "
        "take it out of the layers that are applied again, or say init=zero",
    )


def _segments(units: tuple[Unit, ...]) -> bool:
    """Whether there is a segment among them or inside them."""
    return any(
        isinstance(unit, Segment) or (isinstance(unit, Reuse) and _segments(unit.body)) for unit in units
    )


def _beside_illegality(unit: Beside, width: int) -> Illegality | None:
    for mixer in unit.branches:
        found = _unit_illegality(Layer(mixer), width)
        if found is not None:
            return found
        if mixer.norms_input:
            sentence = "norms what it reads itself, and mixers beside one another read what one norm gives"
            return Illegality(
                "genes", f"{spell_mixer(mixer, width)}: {sentence}; put it in a layer of its own"
            )
    if unit.shares is not None:
        return Illegality("shares", why_indivisible(unit, width))
    if unit.fuse == "read" and not unit.readers(width):
        return Illegality(
            "no owner",
            "fuse=read leaves what reads the branches beside it, and none does; say attn(source=context)",
        )
    if unit.fuse == "read" and unit.is_normed:
        return Illegality(
            "genes", "fuse=read leaves out branches, whose norms nothing would read; say norm=none"
        )
    return None


def why_indivisible(unit: Beside, width: int) -> str:
    """Why a `Beside` that still has its shares could not be narrowed by them."""
    assert unit.shares is not None
    for mixer, share in zip(unit.branches, unit.shares, strict=True):
        try:
            narrow(mixer, width, Fraction(share, sum(unit.shares)))
        except ValueError as error:
            return str(error)
    raise AssertionError("shares that divide are applied when the unit is made canonical")
