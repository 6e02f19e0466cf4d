"""Published search spaces by name: `published("composer")`, kept as files beside this one, in `spaces/`.

A file says what the space is, its paper and what is departed from; its `[space]` table reads as in a campaign.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from mixforge.search_space.syntax import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A search space that a paper, or this project, has published."""

    name: str
    summary: str
    paper: str
    departures: str
    """What the paper has and this space has not, or the other way round."""
    table: Mapping[str, object]
    """What `Space.from_table` reads."""


@lru_cache(maxsize=1)
def published_names() -> tuple[str, ...]:
    """Every name, in order."""
    folder = files("mixforge.search_space") / "spaces"
    return tuple(
        sorted(each.name.removesuffix(".toml") for each in folder.iterdir() if each.name.endswith(".toml"))
    )


@lru_cache(maxsize=64)
def published(name: str) -> Published:
    """The space of a name. Raises ValueError for an unknown one."""
    if name not in published_names():
        known = ", ".join(published_names())
        raise ValueError(f"there is no space '{name[:80]}'{nearest(name, published_names())}; known: {known}")
    text = (files("mixforge.search_space") / "spaces" / f"{name}.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    return Published(
        name=name,
        summary=tables["summary"],
        paper=tables["paper"],
        departures=" ".join(tables["departures"].split()),
        table=tables["space"],
    )


def with_published(table: Mapping[str, object]) -> Mapping[str, object]:
    """A `[space]` table with `published = "composer"` written out: what stands beside it replaces what the published
    space has, rule by rule and limit by limit. Raises ValueError.
    """
    if "published" not in table:
        return table
    name = table["published"]
    if not isinstance(name, str):
        raise ValueError(f"space.published: {name!r} is not a name; known: {', '.join(published_names())}")
    whole = {**published(name).table, **{key: value for key, value in table.items() if key != "published"}}
    for key in ("rules", "limits"):
        base, own = published(name).table.get(key), table.get(key)
        if isinstance(base, Mapping) and isinstance(own, Mapping):
            whole[key] = {**base, **own}
    return whole
