"""A module as a value: the class (or function) and its arguments, before anything is built.

What a mixer's `build` returns is a `Part`. The model builder makes it; the exporter writes it down as Python.
So the exported source is, by construction, the call that built the searched model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, init=False)
class Part:
    """A call that has not been made: `Part(RMSNorm, width=64)`.

    `make` is a class or a function defined at the top level of a module of this package (or of torch.nn).
    An argument is a number, a string, None, another part, a top-level function, or a list of those.
    """

    make: Callable[..., Any]
    arguments: dict[str, Any]

    def __init__(self, make: Callable[..., Any], **arguments: Any) -> None:
        object.__setattr__(self, "make", make)
        object.__setattr__(self, "arguments", arguments)

    def build(self) -> Any:
        """Make the parts inside, in order, then this one. Draws weights from torch's current generator."""
        return self.make(**{name: _build(value) for name, value in self.arguments.items()})


def _build(value: Any) -> Any:
    if isinstance(value, Part):
        return value.build()
    if isinstance(value, list):
        return [_build(item) for item in value]
    return value
