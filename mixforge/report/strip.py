"""An architecture as a strip of coloured cells, one for each layer, and the legend of the colours."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from html import escape
from itertools import groupby

from mixforge.search_space.architecture import LayerEntry
from mixforge.search_space.mixers import CATALOGUE

# After Paul Tol's muted scheme, which people with any common colour blindness can tell apart, dark enough for
# white letters. There are more families than colours, so each also wears one or two letters of its own.
_COLOURS = ("#332288", "#117733", "#882255", "#0a6c8a", "#8a5a00", "#aa4499", "#44546a", "#a63d2f", "#5f6f00")


def strip(layers: Iterable[LayerEntry]) -> str:
    """HTML of one architecture."""
    units = "".join(_unit(list(beside)) for _, beside in groupby(layers, key=lambda entry: entry.number))
    return f'<div class="strip">{units}</div>'


def _unit(entries: list[LayerEntry]) -> str:
    times = f"<sup>{entries[0].times}×</sup>" if entries[0].times > 1 else ""
    return f'<span class="unit">{"".join(map(_cell, entries))}{times}</span>'


def _cell(entry: LayerEntry) -> str:
    family = entry.mixer.word()
    title = escape(f"layer {entry.number}: {entry.text}", quote=True)
    return (
        f'<i class="{entry.kind}" style="background:{colour(family)}" title="{title}">{letters(family)}</i>'
    )


def legend(architectures: Iterable[Iterable[LayerEntry]]) -> str:
    """HTML: each family that occurs, with the names it goes by in these architectures."""
    names: dict[str, set[str]] = {}
    kinds: dict[str, str] = {}
    for entry in (entry for layers in architectures for entry in layers):
        family = entry.mixer.word()
        names.setdefault(family, set()).add(entry.name)
        kinds[family] = entry.kind
    rows = []
    for family in sorted(names, key=lambda family: (kinds[family] != "token", family)):
        others = ", ".join(sorted(names[family] - {family}))
        swatch = f'<i class="{kinds[family]}" style="background:{colour(family)}">{letters(family)}</i>'
        rows.append(f"<span>{swatch} {escape(family)}{f' ({escape(others)})' if others else ''}</span>")
    return f'<div class="legend">{"".join(rows)}</div>'


def colour(family: str) -> str:
    """The colour of a mixer's family, by its place in the catalogue."""
    return _COLOURS[list(CATALOGUE).index(family) % len(_COLOURS)]


def letters(family: str) -> str:
    """One or two letters of a mixer's family that no other has: its first, with the first later one that is free."""
    return _letters()[family]


@cache
def _letters() -> dict[str, str]:
    found: dict[str, str] = {}
    for family in CATALOGUE:
        choices = [family[0], *(family[0] + other for other in family[1:])]
        found[family] = next(each for each in choices if each not in found.values())
    return {family: each.capitalize() for family, each in found.items()}
