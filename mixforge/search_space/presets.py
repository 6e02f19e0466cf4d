"""Published architectures by name: `preset("griffin", size="small")`.

They are data: the files of `architectures/`, one for each family, a table for each preset. Each is a text with places
for the sizes. `tiny` trains in seconds on one core and is what campaigns on a laptop start from; `small` has the depth
and width of small studies; `published` is a model of the paper. The vocabulary is bytes, unless the size says otherwise.
"""

from __future__ import annotations

import string
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import parse
from mixforge.search_space.syntax import nearest

Size = Literal["tiny", "small", "published"]
SIZES: tuple[Size, ...] = ("tiny", "small", "published")
_WORDS = frozenset({"summary", "paper", "text", "departs", *SIZES})


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A published architecture."""

    name: str
    family: str
    """The file it is in."""
    summary: str
    paper: str
    """Authors, year, arXiv id, and the section or figure that shows the stack."""
    departs: str | None
    """Where the text leaves the paper."""
    text: str
    """An expression with places such as {width}."""
    sizes: Mapping[Size, Mapping[str, int]]

    def architecture(self, size: Size = "tiny") -> Architecture:
        """The architecture of one size. Raises ValueError for an unknown size."""
        if size not in self.sizes:
            hint = nearest(size, self.sizes)
            raise ValueError(f"preset {self.name} has no size {size!r}{hint}; it has {', '.join(self.sizes)}")
        given = dict(self.sizes[size])
        vocab = given.pop("vocab", None)
        read = parse(self.text.format(**given))
        return read if vocab is None else read.replace(vocab=vocab)


def _read(name: str, family: str, table: Mapping[str, object]) -> Preset:
    """A preset of a table. The files are the package's own: a mistake in one is a mistake in this code."""
    places = {place for _, place, _, _ in string.Formatter().parse(str(table["text"])) if place}
    sizes: dict[Size, Mapping[str, int]] = {}
    for size in SIZES:
        given = table[size]
        assert isinstance(given, dict), f"{family}.toml: {name}.{size} is no table"
        assert places == given.keys() - {"vocab"}, f"{family}.toml: {name}.{size} does not fill {places}"
        sizes[size] = given
    assert table.keys() <= _WORDS, f"{family}.toml: {name} has {sorted(table.keys() - _WORDS)}"
    departs = table.get("departs")
    return Preset(
        name=name,
        family=family,
        summary=str(table["summary"]),
        paper=str(table["paper"]),
        departs=None if departs is None else str(departs),
        text=str(table["text"]),
        sizes=sizes,
    )


def _read_all() -> dict[str, Preset]:
    found: dict[str, Preset] = {}
    folder = files("mixforge.search_space").joinpath("architectures")
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if not file.name.endswith(".toml"):
            continue
        for name, table in tomllib.loads(file.read_text(encoding="utf-8")).items():
            assert name not in found, f"{file.name}: a preset {name} is in {found[name].family}.toml"
            found[name] = _read(name, file.name.removesuffix(".toml"), table)
    return found


PRESETS: dict[str, Preset] = _read_all()


@lru_cache(maxsize=512)
def preset(name: str, size: Size = "tiny") -> Architecture:
    """A published architecture by name. Raises ValueError for an unknown name or size."""
    if name not in PRESETS:
        raise ValueError(
            f"unknown preset '{name}'{nearest(name, PRESETS)}; `mixforge presets` lists all {len(PRESETS)}"
        )
    return PRESETS[name].architecture(size)
