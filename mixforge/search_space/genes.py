"""Genes: the named, bounded choices of a mixer.

A gene is a field of a mixer's frozen dataclass, annotated with its legal values:

    heads: Annotated[int | None, Whole(1, 256)] = None
    pos: Annotated[str, Choice("rope", "none")] = "rope"
    kv: Annotated[str | Form, Choice("mha", "mqa"), Call("gqa", Whole(1, 256))] = "mha"

A value is an int, a float, a name (`str`), a `Form` such as `gqa(4)`, or None for "follows from the width".
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import compress, repeat
from json.encoder import encode_basestring_ascii
from operator import attrgetter, is_not
from typing import TYPE_CHECKING, TypeVar, cast, get_type_hints

from mixforge.search_space.expression import spell_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True)
class Form:
    """A name with arguments as a gene's value: `gqa(4)`, `taylor(2)`."""

    name: str
    arguments: tuple[int | float, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(spell_number, self.arguments))})"


GeneValue = int | float | str | Form | None


@dataclass(frozen=True, slots=True)
class Whole:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def has(self, value: GeneValue) -> bool:
        return isinstance(value, int) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Real:
    """Numbers from `low` to `high`, both included. A whole number is taken as a number."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def has(self, value: GeneValue) -> bool:
        # A tuple: a union is made anew each time.
        return isinstance(value, (int, float)) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True, init=False)
class Choice:
    """One of a few names."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def __str__(self) -> str:
        return ", ".join(self.names)

    def has(self, value: GeneValue) -> bool:
        return isinstance(value, str) and value in self.names


@dataclass(frozen=True, slots=True, init=False)
class Call:
    """A name with numbers behind it: `Call("gqa", Whole(1, 64))` allows gqa(1) to gqa(64)."""

    name: str
    arguments: tuple[Whole | Real, ...]

    def __init__(self, name: str, *arguments: Whole | Real) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "arguments", arguments)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(str(argument) for argument in self.arguments)})"

    def has(self, value: GeneValue) -> bool:
        if not isinstance(value, Form) or value.name != self.name:
            return False
        given = value.arguments
        return len(given) == len(self.arguments) and all(map(_has, self.arguments, given))


def _has(domain: Whole | Real, value: int | float) -> bool:
    return domain.has(value)


Domain = Whole | Real | Choice | Call


@dataclass(frozen=True, slots=True)
class Gene:
    """A gene of a mixer: its legal values and its default."""

    name: str
    domains: tuple[Domain, ...]
    default: GeneValue
    words: Mapping[str, str] = field(init=False, repr=False, compare=False)
    """The names among its legal values, each with the JSON that says it."""

    def __post_init__(self) -> None:
        names = [name for each in self.domains if isinstance(each, Choice) for name in each.names]
        object.__setattr__(
            self, "words", {name: f'"{self.name}":{encode_basestring_ascii(name)}' for name in names}
        )

    def __str__(self) -> str:
        """The legal values, in words."""
        return " or ".join(map(str, self.domains)) + (" or auto" if self.default is None else "")

    def has(self, value: GeneValue) -> bool:
        """Whether the value is legal. None is, where it is the default."""
        if isinstance(value, str):
            return value in self.words
        if value is None:
            return self.default is None
        for domain in self.domains:  # noqa: SIM110 (a generator takes twice as long, and this is asked of every gene)
            if domain.has(value):
                return True
        return False


@lru_cache(maxsize=1_024)
def genes_of(mixer: type[DataclassInstance]) -> dict[str, Gene]:
    """The genes of a mixer's class by name, in the order of its file, read from its fields' annotations.

    A field that is not given when a mixer is made is no gene.
    """
    hints = get_type_hints(mixer, include_extras=True)
    return {
        each.name: Gene(each.name, hints[each.name].__metadata__, cast(GeneValue, each.default))
        for each in fields(mixer)
        if each.init
    }


@lru_cache(maxsize=1_024)
def _reader(mixer: type[DataclassInstance]) -> Callable[[DataclassInstance], tuple[GeneValue, ...]]:
    names = list(genes_of(mixer))
    # One name alone gives no tuple.
    return attrgetter(*names) if len(names) > 1 else lambda made: tuple(getattr(made, name) for name in names)


@lru_cache(maxsize=1_024)
def _defaults(mixer: type[DataclassInstance]) -> tuple[tuple[Gene, ...], tuple[GeneValue, ...]]:
    genes = tuple(genes_of(mixer).values())
    return genes, tuple(gene.default for gene in genes)


def all_values(mixer: DataclassInstance) -> tuple[GeneValue, ...]:
    """The value of each gene of a mixer, in the order of its file."""
    return _reader(type(mixer))(mixer)


def changed_genes(mixer: DataclassInstance) -> list[tuple[Gene, GeneValue]]:
    """The genes of a mixer that are not at their default, and their values, in the order of its file."""
    genes, defaults = _defaults(type(mixer))
    values = all_values(mixer)
    # Most genes hold their default itself. Finding that out without a Python loop is four times as fast.
    moved = compress(zip(genes, values), map(is_not, values, defaults))  # noqa: B905 (as many, and it is slower)
    return [(gene, value) for gene, value in moved if value != gene.default]


def gene_json(gene: Gene, value: GeneValue) -> str:
    """A gene and its value as canonical JSON, which stands between the brackets of an object."""
    if isinstance(value, str) and value in gene.words:
        return gene.words[value]
    # Of True, which equals 1, too.
    if isinstance(value, int):
        return f'"{gene.name}":{value:d}'
    if isinstance(value, float):
        return f'"{gene.name}":{spell_number(value)}'
    return f'"{gene.name}":{"null" if value is None else encode_basestring_ascii(str(value))}'


Genes = TypeVar("Genes", bound="DataclassInstance")


def replace(mixer: Genes, **genes: GeneValue) -> Genes:
    """`dataclasses.replace`, which gives the mixer itself where it has these genes: most canonical forms do, and
    making a mixer of twenty genes anew takes longer than everything else that is done with one."""
    if list(map(getattr, repeat(mixer), genes)) == list(genes.values()):
        return mixer
    # What dataclasses.replace does, which looks at every field by name.
    kind = type(mixer)
    return kind(**{**dict(zip(genes_of(kind), all_values(mixer), strict=True)), **genes})
