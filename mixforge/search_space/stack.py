"""What an architecture's stack is made of: layers, layers beside one another, and weights applied several
times.

A unit is one residual unit, `x + f(norm(x))`, or a group of units whose weights are applied more than once.
Repeats (`n * a`) are not units: a stack is the flat sequence after they are written out. This module loads no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from mixforge.search_space.genes import Choice, Form, Gene, GeneValue, genes_of
from mixforge.search_space.mixer import Mixer
from mixforge.search_space.syntax import spell_number

Fuse = Literal["sum", "mean", "gate", "concat", "scalar"]
FUSES: tuple[Fuse, ...] = ("sum", "mean", "gate", "concat", "scalar")
BranchNorm = Literal["none", "rms"]
MOST_UNITS = 1_024
MOST_BRANCHES = 16

# The words of each long form, read as a mixer's genes are.
FORMS: dict[str, dict[str, Gene]] = {
    "beside": {
        "fuse": Gene("fuse", (Choice(*FUSES),), "sum"),
        "norm": Gene("norm", (Choice("none", "rms"),), None),
    },
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
    itself, which is a norm for a mean and none for the others.
    """

    branches: tuple[Mixer, ...]
    fuse: Fuse = "sum"
    shares: tuple[int, ...] | None = None
    norm: BranchNorm | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 2 <= len(self.branches) <= MOST_BRANCHES:
            raise ValueError(f"{len(self.branches)} branches side by side; there are 2 to {MOST_BRANCHES}")
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
    """The same weights applied `times` times, each application with a state of its own: `n @ a`."""

    times: int
    body: tuple[Unit, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.times <= MOST_UNITS or not self.body:
            raise ValueError(
                f"weights are applied 1 to {MOST_UNITS} times to at least one layer, not {self.times} times"
            )
        object.__setattr__(self, "_hash", hash((self.times, self.body)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Reuse], tuple[object, ...]]:
        return Reuse, (self.times, self.body)


Unit = Layer | Beside | Reuse


def depth(units: tuple[Unit, ...]) -> int:
    """Residual units that one token passes through, reused ones as often as they are applied."""
    return sum(unit.times * depth(unit.body) if isinstance(unit, Reuse) else 1 for unit in units)


def mixers(units: tuple[Unit, ...]) -> Iterator[Mixer]:
    """Every mixer of the stack in order, those of reused weights once."""
    for unit in units:
        match unit:
            case Layer():
                yield unit.mixer
            case Beside():
                yield from unit.branches
            case Reuse():
                yield from mixers(unit.body)


@lru_cache(maxsize=65_536)
def genes(mixer: Mixer) -> tuple[tuple[str, GeneValue], ...]:
    """The genes that differ from their defaults, in the order of their names."""
    defaults = gene_defaults(type(mixer))
    given = ((name, getattr(mixer, name)) for name in sorted(defaults))
    return tuple((name, value) for name, value in given if value != defaults[name])


@lru_cache(maxsize=1_024)
def gene_defaults(mixer: type[Mixer]) -> dict[str, GeneValue]:
    """A mixer's genes and their defaults, in the order of its file."""
    return {name: gene.default for name, gene in genes_of(mixer).items()}


@lru_cache(maxsize=65_536)
def mixer_json(mixer: Mixer) -> str:
    """A mixer as canonical JSON: its name and the genes that differ from their defaults."""
    parts = [f'"{name}":{gene_json(value)}' for name, value in genes(mixer)]
    return f'["{mixer.word()}",{{{",".join(parts)}}}]'


def gene_json(value: GeneValue) -> str:
    """A gene's value as canonical JSON."""
    match value:
        case Form():
            return json.dumps(str(value))
        case int() | float():
            return spell_number(value)
    return json.dumps(value)


@lru_cache(maxsize=65_536)
def unit_json(unit: Unit) -> str:
    """A unit as canonical JSON."""
    match unit:
        case Layer():
            return mixer_json(unit.mixer)
        case Beside():
            fuse = "" if unit.fuse == "sum" else f',"fuse":"{unit.fuse}"'
            fuse += "" if unit.norm is None else f',"norm":"{unit.norm}"'
            shares = "" if unit.shares is None else f',"shares":[{",".join(map(str, unit.shares))}]'
            return f'{{"beside":[{",".join(map(mixer_json, unit.branches))}]{fuse}{shares}}}'
        case Reuse():
            return f'{{"reuse":{unit.times},"body":[{",".join(map(unit_json, unit.body))}]}}'
