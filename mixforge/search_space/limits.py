"""Limits of a search space: what an architecture may cost to be tried at all.

    [space.limits]
    params      = "<= 2e6"
    state_bytes = "<= 256e3 at 4096"
    depth       = ">= 4, <= 24"

`depth` is in residual units. `at N` is the context, in tokens, at which flops, state_bytes and decode_bytes
are stated.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.syntax import nearest, spell_number

_QUANTITIES: dict[str, bool] = {
    "params": False,
    "depth": False,
    "flops": True,
    "state_bytes": True,
    "decode_bytes": True,
}
"""Name -> whether it depends on the context."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}

_CONDITION = re.compile(
    r"\s*(?P<comparison><=|>=)\s*(?P<bound>\d{1,15}(?:\.\d{0,9})?(?:[eE][+]?\d{1,2})?)(?:\s+at\s+(?P<length>\d{1,9}))?\s*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One condition on one quantity."""

    quantity: str
    comparison: str
    bound: float
    length: int | None
    """Tokens of context; None for a quantity that does not depend on it."""

    def __str__(self) -> str:
        context = "" if self.length is None else f" at {self.length}"
        return f"{self.quantity} {self.comparison} {spell_number(self.bound)}{context}"

    def why_broken(self, architecture: Architecture) -> str | None:
        """None where the architecture keeps to the limit, else a sentence with both numbers."""
        value = self._value(architecture)
        if _COMPARISONS[self.comparison](value, self.bound):
            return None
        return f"{self.quantity} is {value}, the limit is {self}"

    def excess(self, architecture: Architecture) -> float:
        """How far outside of the limit the architecture is, as the logarithm of a ratio; 0 where it keeps to it."""
        value = self._value(architecture)
        if _COMPARISONS[self.comparison](value, self.bound):
            return 0.0
        # A limit of 0, or a value of 0, has no ratio.
        return abs(math.log((value + 1) / (self.bound + 1)))

    def _value(self, architecture: Architecture) -> int:
        if self.quantity == "depth":
            return architecture.depth
        cost = architecture.cost(self.length or 1)
        match self.quantity:
            case "params":
                return cost.params
            case "flops":
                return cost.flops
            case "state_bytes":
                return cost.state_bytes
            case _:
                return cost.decode_bytes


def read_limits(table: Mapping[str, object]) -> tuple[Limit, ...]:
    """The limits of a `[space.limits]` table, in its order. Raises ValueError for an unknown quantity or
    condition."""
    return tuple(limit for quantity, text in table.items() for limit in _read(quantity, text))


def _read(quantity: str, text: object) -> list[Limit]:
    if quantity not in _QUANTITIES:
        raise ValueError(
            f"space.limits: unknown quantity '{quantity}'{nearest(quantity, _QUANTITIES)} "
            f"(there are {', '.join(_QUANTITIES)})"
        )
    form = "<= 2e6 at 4096" if _QUANTITIES[quantity] else "<= 2e6"
    if not isinstance(text, str):
        raise ValueError(
            f'space.limits.{quantity}: {text!r} is not a condition; write a text such as "{form}"'
        )
    return [_condition(quantity, part, form) for part in text.split(",")]


def _condition(quantity: str, text: str, form: str) -> Limit:
    matched = _CONDITION.fullmatch(text)
    if matched is None:
        raise ValueError(
            f"space.limits.{quantity}: '{text.strip()[:80]}' is not a condition such as '{form}'"
        )
    length = None if matched["length"] is None else int(matched["length"])
    if _QUANTITIES[quantity] and not length:
        raise ValueError(
            f"space.limits.{quantity}: '{text.strip()}' does not say at what context it holds; write '{form}'"
        )
    if length is not None and not _QUANTITIES[quantity]:
        raise ValueError(f"space.limits.{quantity} does not depend on the context; leave out 'at {length}'")
    return Limit(
        quantity=quantity, comparison=matched["comparison"], bound=float(matched["bound"]), length=length
    )
