"""A table of a campaign file as a frozen record: every key known, every value of its type.

Ranges are the record's own business (`__post_init__`); this module says which table an error was found in.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, TypeGuard, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")

_RULES: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    bool: "true or false",
    str | None: "text in quotes",
    tuple[float, ...]: "a number or a list of numbers",
}


def read_record(kind: type[Record], table: Mapping[str, object], where: str) -> Record:
    """The record that a table says. `where` names the table in errors: `[tasks.mqar]`.

    Raises ValueError for an unknown key (with the nearest known one), a missing key, a wrong type or range.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    refuse_unknown(table, fields, where)
    hints = typing.get_type_hints(kind)
    values = {key: _convert(value, hints[key], f"{where}: {key}") for key, value in table.items()}
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has the keys {', '.join(fields)}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def refuse_unknown(table: Mapping[str, object], known: Collection[str], where: str) -> None:
    """Raises ValueError where a key of `table` is not known, naming the nearest one that is."""
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{where} has no key {key!r}{hint} Known keys: {', '.join(known)}")


def _is_required(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(value: object, kind: object, where: str) -> object:
    """The value as its field wants it: a whole number is a number, a lone number a list of one."""
    # A field of another kind (a record, a name out of a few) is checked by whoever reads it.
    if kind not in _RULES:
        return value
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_text = isinstance(value, str)
    if (kind is int and is_whole) or (kind in (str, str | None) and is_text):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and _is_number(value):
        return float(value)
    if kind == tuple[float, ...]:
        given = value if isinstance(value, list | tuple) else [value]
        numbers = tuple(float(item) for item in given if _is_number(item))
        if numbers and len(numbers) == len(given):
            return numbers
    raise ValueError(f"{where} = {value!r} is not {_RULES[kind]}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
