"""The configuration of a checkpoint, read one value at a time, so that what is refused is named."""

from __future__ import annotations

from collections.abc import Mapping

from mixforge.search_space.syntax import nearest


class Config:
    """config.json. Every getter raises ValueError with the key, what it is and what it must be."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"config.json: {name} is {value!r}; expected a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"config.json: {name} is {value!r}; expected a number")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} is {value!r}; expected true or false")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self._get(name, None)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"config.json: {name} is {value!r}; expected a list of names")
        return tuple(value)

    def wholes(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self._get(name, None)
        if not isinstance(value, list) or not all(isinstance(each, int) for each in value):
            raise ValueError(f"config.json: {name} is {value!r}; expected a list of whole numbers")
        return tuple(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of so many numbers, of ones where it is missing."""
        value = self._get(name, [1.0] * count)
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(f"config.json: {name} is {value!r}; expected a list of {count} numbers")
        return tuple(float(each) for each in value)

    def choice(self, name: str, known: Mapping[str, str], default: str | None = None) -> str:
        """A name of theirs as the name of ours that `known` gives it."""
        value = self._get(name, default)
        if value not in known:
            listed = ", ".join(known)
            raise ValueError(
                f"config.json: {name} is {value!r}; what can be said is {listed}{nearest(str(value), known)}"
            )
        return known[str(value)]

    def must(self, name: str, wanted: object, why: str) -> None:
        """Refuse another value than the one that our mixers have; a missing key is that value."""
        value = self.values.get(name, wanted)
        if value != wanted:
            raise ValueError(f"config.json: {name} is {value!r}, and only {wanted!r} can be said: {why}")

    def unlimited(self, name: str) -> None:
        """Refuse limits, a pair of numbers, that leave anything out."""
        value = self.values.get(name)
        if value is None:
            return
        # JSON has no infinity, so that writers have forms of their own for it.
        if not isinstance(value, list) or value[0] != 0 or "inf" not in str(value[1]).lower():
            raise ValueError(f"config.json: {name} is {value!r}, and only (0, infinity) can be said")

    def table(self, name: str) -> Config:
        """A table inside, empty where it is missing or null."""
        value = self.values.get(name)
        if value is None:
            return Config({})
        if not isinstance(value, Mapping):
            raise ValueError(f"config.json: {name} is {value!r}; expected a table")
        return Config(value)

    def theta(self, default: float = 10_000.0, layer_type: str | None = None) -> float:
        """The base of rotary position, of layers of this type. Scaled frequencies (YaRN, linear, ...) are refused."""
        rope = self.rope(layer_type)
        kind = rope.values.get("rope_type", rope.values.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"config.json: rope_type is {kind!r}, and only 'default' can be said: theta is one number"
            )
        return rope.number("rope_theta", self.number("rope_theta", default))

    def rope(self, layer_type: str | None = None) -> Config:
        """The table of rotary position, of layers of this type where each has its own."""
        rope = self.table("rope_parameters") if "rope_parameters" in self else self.table("rope_scaling")
        return rope.table(layer_type) if layer_type is not None and layer_type in rope else rope

    def _get(self, name: str, default: object) -> object:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"config.json has no {name}; a checkpoint of this class needs it")
        return value
