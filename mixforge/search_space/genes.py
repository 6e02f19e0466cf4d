"""Genes: the named, bounded choices of a mixer.

A gene is a field of a mixer's frozen dataclass, annotated with its legal values:

    heads: Annotated[int | None, Whole(1, 256)] = None
    pos: Annotated[str, Choice("rope", "none")] = "rope"
    kv: Annotated[str | Form, Choice("mha", "mqa"), Call("gqa", Whole(1, 256))] = "mha"

A value is an int, a float, a name (`str`), a `Form` such as `gqa(4)`, or None for "follows from the width".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Form:
    """A name with arguments as a gene's value: `gqa(4)`, `taylor(2)`."""

    name: str
    arguments: tuple[int | float, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(str(argument) for argument in self.arguments)})"


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
        return isinstance(value, int | float) and self.low <= value <= self.high


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
        return (
            isinstance(value, Form)
            and value.name == self.name
            and len(value.arguments) == len(self.arguments)
            and all(domain.has(given) for domain, given in zip(self.arguments, value.arguments, strict=True))
        )


Domain = Whole | Real | Choice | Call
