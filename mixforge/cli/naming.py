"""What a person may write where an architecture is asked for: an expression, a preset's name or a digest."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from mixforge.cli.database import open_results

if TYPE_CHECKING:
    from mixforge.search_space.architecture import Architecture
    from mixforge.search_space.grammar import Space

_DIGEST = re.compile(r"[0-9a-fA-F]{4,64}")


def is_digest(text: str) -> bool:
    """Whether a text can only be a digest, or the beginning of one."""
    return _DIGEST.fullmatch(text.strip()) is not None


def architecture_of(text: str, db: str) -> Architecture:
    """The architecture that a text means. Raises ValueError where it means none, or more than one digest fits."""
    from mixforge.search_space.notation import parse
    from mixforge.search_space.presets import PRESETS, preset
    from mixforge.search_space.syntax import nearest

    if is_digest(text):
        with open_results(db) as results:
            return results.architecture(text)
    name, _, size = text.partition(":")
    if name in PRESETS:
        return preset(name, size or "tiny")
    if text.replace("_", "a").isalnum():
        raise ValueError(
            f"{text!r} is no preset (`mixforge presets` lists them), no digest (four or more hexadecimal digits) and no "
            f'expression (such as "lm(4 * (attn + swiglu), width=128)"){nearest(name, PRESETS)}'
        )
    return parse(text)


def is_space(text: str) -> bool:
    """Whether a text can only mean a search space: a file's path, or a published space's name."""
    from mixforge.search_space.published import published_names

    return text.endswith(".toml") or text in published_names()


def space_of(text: str) -> Space:
    """The search space of a campaign's TOML file, or of a published space's name. Raises ValueError."""
    from mixforge.search_space.grammar import Space
    from mixforge.search_space.published import published_names

    if text in published_names():
        return Space.published(text)
    path = Path(text)
    if "." not in text and not path.exists():
        # Names the nearest published space.
        return Space.published(text)
    try:
        tables = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(tables.get("space"), dict):
        raise ValueError(f'{path}: has no [space] table; a space begins with [space] and start = "lm(...)"')
    try:
        return Space.from_table(tables["space"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_folder(folder: Path, option: str) -> None:
    """Make a folder and those around it. Raises ValueError, which names the option that asked for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the folder {folder} cannot be made ({error.strerror}); give {option} a path that can be written"
        ) from None


def folder_of(db: str) -> Path:
    """The folder that a database's weights are kept beside: its own, or this one where a server holds it."""
    from mixforge.db.connection import read_url

    url = read_url(db)
    is_file = url.get_backend_name() == "sqlite" and url.database is not None
    return Path(str(url.database)).parent if is_file else Path()
