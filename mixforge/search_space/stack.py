"""What an architecture's stack is made of: layers, layers beside one another, and weights applied several
times.

A unit is one residual unit, `x + f(norm(x))`, or a group of units whose weights are applied more than once.
Repeats (`n * a`) are not units: a stack is the flat sequence after they are written out. This module loads no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from mixforge.search_space.genes import Call, Choice, Form, Gene, GeneValue, Whole, genes_of
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.words import WORDS

Fuse = Literal["sum", "mean", "gate", "concat", "scalar", "read"]
FUSES: tuple[Fuse, ...] = ("sum", "mean", "gate", "concat", "scalar", "read")
BranchNorm = Literal["none", "rms"]
MOST_UNITS = 1_024
MOST_BRANCHES = 16

# The words of each long form, read as a mixer's genes are.
FORMS: dict[str, dict[str, Gene]] = {
    "beside": {
        "fuse": Gene("fuse", (Choice(*FUSES),), "sum"),
        "norm": Gene("norm", (Choice("none", "rms"),), None),
    },
    "reuse": {
        "times": Gene("times", (Whole(1, MOST_UNITS),), 1),
        "halt": Gene("halt", (Choice("none", "act"),), "none"),
        "signal": Gene("signal", (Choice("none", "step"),), "none"),
    },
    "segment": {
        "length": Gene("length", (Whole(1, 1_048_576),), 512),
        "memory": Gene("memory", (Whole(1, 4_096),), 16),
        "carry": Gene("carry", (Choice("tokens"), Call("associative", Whole(1, 1_024))), "tokens"),
    },
    "residual": {"place": Gene("place", WORDS["place"].domains, None)},
}


# Units are keys of every memory below, and a mixer has many genes: each unit computes its hash once. A hash
# does not outlive its process, so a pickled unit is its arguments.


@dataclass(frozen=True, slots=True)
class Layer:
    """One mixer in its own residual unit."""

    mixer: Mixer
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.mixer))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Layer], tuple[Mixer]]:
        return Layer, (self.mixer,)


@dataclass(frozen=True, slots=True)
class Beside:
    """Mixers that read the same normed input, their outputs fused into one residual (an intra-layer hybrid).

    Canonical form: the order of the branches has no meaning and is sorted; shares of the heads are applied to
    the branches (`Mixer.narrow`) and are None afterwards. Where the heads do not divide so, the shares stay
    and `why_illegal` says it. norm: of each branch's output before it is fused; None is what the fuse has by
    itself, which is a norm for a mean and none for the others. Branches that read the context read the sum of what the
    others say (`parts/beside`).
    """

    branches: tuple[Mixer, ...]
    fuse: Fuse = "sum"
    shares: tuple[int, ...] | None = None
    norm: BranchNorm | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 2 <= len(self.branches) <= MOST_BRANCHES:
            raise ValueError(f"{len(self.branches)} side by side; there are 2 to {MOST_BRANCHES} branches")
        if self.fuse not in FUSES:
            raise ValueError(f"fuse {self.fuse!r} is not one of {', '.join(FUSES)}")
        if self.norm not in (None, "none", "rms"):
            raise ValueError(f"norm {self.norm!r} of the branches is not none or rms")
        if self.shares is not None and (len(self.shares) != len(self.branches) or min(self.shares) < 1):
            raise ValueError(f"shares {self.shares} are not one whole number from 1 up for each branch")
        object.__setattr__(self, "_hash", hash((self.branches, self.fuse, self.shares, self.norm)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Beside], tuple[object, ...]]:
        return Beside, (self.branches, self.fuse, self.shares, self.norm)

    def readers(self, width: int) -> tuple[int, ...]:
        """The branches that read the context."""
        return tuple(n for n, branch in enumerate(self.branches) if "context" in branch.borrows(width))

    @property
    def own_norm(self) -> BranchNorm:
        """The norm that its fuse has where nothing is said."""
        return "rms" if self.fuse == "mean" else "none"

    @property
    def is_normed(self) -> bool:
        """Whether each branch's output is normed."""
        return (self.norm or self.own_norm) == "rms"

    @property
    def is_plain(self) -> bool:
        """Whether `a | b` says it."""
        return self.fuse == "sum" and self.norm is None


@dataclass(frozen=True, slots=True)
class Reuse:
    """The same weights applied `times` times, each application with a state of its own: `n @ a`.

    halt: whether each token stops by itself. signal: whether an application is told its number (`parts/halting`).
    """

    times: int
    body: tuple[Unit, ...]
    halt: str = "none"
    signal: str = "none"
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.times <= MOST_UNITS or not self.body:
            raise ValueError(
                f"weights are applied 1 to {MOST_UNITS} times to at least one layer, not {self.times} times"
            )
        _check_words("reuse", {"halt": self.halt, "signal": self.signal})
        object.__setattr__(self, "_hash", hash((self.times, self.body, self.halt, self.signal)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Reuse], tuple[object, ...]]:
        return Reuse, (self.times, self.body, self.halt, self.signal)

    @property
    def is_plain(self) -> bool:
        """Whether `n @ a` says it."""
        return self.halt == "none" and self.signal == "none"


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers that begin anew every `length` tokens, but for what `memory` tokens carry from segment to segment.

    carry: `tokens`, the memory tokens themselves (`parts/segment`); `associative(n)`, a matrix for each block with
    keys of n channels, which they write to (`parts/associative_segment`).
    """

    body: tuple[Unit, ...]
    length: int
    memory: int
    carry: str | Form = "tokens"
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.body:
            raise ValueError("a segment has at least one layer")
        _check_words("segment", {"length": self.length, "memory": self.memory, "carry": self.carry})
        object.__setattr__(self, "_hash", hash((Segment, self.body, self.length, self.memory, self.carry)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Segment], tuple[object, ...]]:
        return Segment, (self.body, self.length, self.memory, self.carry)

    @property
    def ahead(self) -> int:
        """Memory tokens at the beginning of a segment."""
        return self.memory if self.carry == "tokens" else 0

    @property
    def slots(self) -> int:
        """Tokens of a whole segment, with those of the memory."""
        return self.ahead + self.length + self.memory

    def earlier(self, tokens: int) -> int:
        """Whole segments before the last one of a sequence."""
        return -(-tokens // self.length) - 1

    def blocks(self) -> tuple[tuple[Unit, ...], ...]:
        """The body in parts that each begin with a unit that mixes tokens, but for what stands before the first."""
        begins = [index for index, unit in enumerate(self.body) if mixes_tokens(unit)]
        ends = [*begins[1:], len(self.body)]
        return tuple(self.body[begin:end] for begin, end in zip([0, *begins[1:]], ends, strict=True))


@dataclass(frozen=True, slots=True)
class Residual:
    """One residual connection around units that are applied one after the other (`parts/residual`).

    Mixers of the body have no residual connection of their own; a residual of the body has its own. place: of the norms
    of its mixers; None is the model's.
    """

    body: tuple[Unit, ...]
    place: str | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.body:
            raise ValueError("a residual has at least one layer")
        if any(isinstance(unit, Reuse | Segment) for unit in self.body):
            raise ValueError(
                "a residual is around mixers, mixers beside one another and residuals; put n @ and segment around it"
            )
        _check_words("residual", {"place": self.place})
        object.__setattr__(self, "_hash", hash((Residual, self.body, self.place)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Residual], tuple[object, ...]]:
        return Residual, (self.body, self.place)


def _check_words(form: str, given: dict[str, GeneValue]) -> None:
    for word, value in given.items():
        if not FORMS[form][word].has(value):
            raise ValueError(f"{word} {value!r} of {form} is not legal; expected {FORMS[form][word]}")


Unit = Layer | Beside | Reuse | Segment | Residual


def norms_input(unit: Unit) -> bool:
    """Whether no norm of a residual stands before it."""
    return isinstance(unit, Layer) and unit.mixer.norms_input


def mixes_tokens(unit: Unit) -> bool:
    """Whether a token mixer is in it."""
    if isinstance(unit, Layer):
        return unit.mixer.kind == "token"
    return any(mixer.kind == "token" for mixer in mixers((unit,)))


def depth(units: tuple[Unit, ...]) -> int:
    """Residual units that one token passes through, reused ones as often as they are applied; of a residual around
    several mixers, the mixers.
    """
    found = 0
    for unit in units:
        match unit:
            case Layer() | Beside():
                found += 1
            case Reuse():
                found += unit.times * depth(unit.body)
            case Segment() | Residual():
                found += depth(unit.body)
    return found


def mixers(units: tuple[Unit, ...]) -> Iterator[Mixer]:
    """Every mixer of the stack in order, those of reused weights once."""
    for unit in units:
        match unit:
            case Layer():
                yield unit.mixer
            case Beside():
                yield from unit.branches
            case Reuse() | Segment() | Residual():
                yield from mixers(unit.body)


@lru_cache(maxsize=1_024)
def gene_defaults(mixer: type[Mixer]) -> dict[str, GeneValue]:
    """A mixer's genes and their defaults, in the order of its file."""
    return {name: gene.default for name, gene in genes_of(mixer).items()}


def unit_json(unit: Unit) -> str:
    """A unit as canonical JSON."""
    match unit:
        case Layer():
            return unit.mixer.json
        case Beside():
            fuse = "" if unit.fuse == "sum" else f',"fuse":"{unit.fuse}"'
            fuse += "" if unit.norm is None else f',"norm":"{unit.norm}"'
            shares = "" if unit.shares is None else f',"shares":[{",".join(map(str, unit.shares))}]'
            return f'{{"beside":[{",".join([branch.json for branch in unit.branches])}]{fuse}{shares}}}'
        case Reuse():
            words = "" if unit.halt == "none" else f',"halt":"{unit.halt}"'
            words += "" if unit.signal == "none" else f',"signal":"{unit.signal}"'
            return f'{{"reuse":{unit.times},"body":[{",".join(map(unit_json, unit.body))}]{words}}}'
        case Segment():
            body = ",".join(map(unit_json, unit.body))
            carry = "" if unit.carry == "tokens" else f',"carry":"{unit.carry}"'
            return f'{{"segment":{unit.length},"body":[{body}]{carry},"memory":{unit.memory}}}'
        case Residual():
            place = "" if unit.place is None else f',"place":"{unit.place}"'
            return f'{{"residual":[{",".join(map(unit_json, unit.body))}]{place}}}'
