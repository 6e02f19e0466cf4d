"""Bytes of real text in three disjoint splits.

Without a path it is the source of Python's own standard library, which every machine has. A folder, and the
library, are split by file: files are taken in the order of a hash of their relative path, the first
twentieth of the bytes for selection, the next for test, the rest for training; a file whose content was
seen before is left out. A single file is split into contiguous blocks: nine tenths for training, then a
twentieth each for selection and test.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mixforge.search_space.count import counted

Bytes = npt.NDArray[np.uint8]

# What lies behind is left out: no campaign of the sizes that one machine trains reads more.
MOST_BYTES = 256 * 2**20
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
_HELD_OUT_SHARE = 20


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Bytes by split, what they were read from, and a digest of all three."""

    train: Bytes
    selection: Bytes
    test: Bytes
    source: str
    files: dict[str, tuple[str, ...]]
    """Relative paths by split; empty where one file was split into blocks."""
    sha256: str


@lru_cache(maxsize=8)
def read_corpus(path: str | None) -> Corpus:
    """The bytes under a path, or of the standard library. Read once in a process.

    Raises ValueError where nothing is there, it cannot be read, or a split would be empty.
    """
    if path is None:
        folder = Path(sysconfig.get_path("stdlib"))
        names = [name for name in _names(folder, _LEFT_OUT) if name.endswith(".py")]
        return _split_by_file(folder, names, "the standard library")
    place = Path(path)
    if place.is_dir():
        return _split_by_file(place, list(_names(place, frozenset())), f"the folder {path}")
    return _split_by_block(place)


def _names(folder: Path, left_out: frozenset[str]) -> Iterator[str]:
    """Relative paths of the files below a folder, hidden ones and links to folders apart, in sorted order."""

    def unreadable(error: OSError) -> None:
        raise ValueError(f"text path {error.filename}: cannot be read ({error.strerror})")

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield (Path(place) / name).relative_to(folder).as_posix()


def _split_by_file(folder: Path, names: list[str], source: str) -> Corpus:
    contents: dict[str, bytes] = {}
    seen: set[bytes] = set()
    total = 0
    for name in sorted(names, key=_hash):
        content = _read(folder / name)
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen and total + len(content) <= MOST_BYTES:
            seen.add(digest)
            contents[name] = content
            total += len(content)
    if len(contents) < 3:
        raise ValueError(
            f"text path {folder}: {source} has {counted(len(contents), 'different file')} with text, and is split "
            "by file, so it needs three or more; to split one file into blocks, name the file itself"
        )
    files = _assign({name: len(content) for name, content in contents.items()})
    joined = [b"".join(contents[name] for name in chosen) for chosen in files.values()]
    train, selection, test = (np.frombuffer(each, dtype=np.uint8) for each in joined)
    return Corpus(train, selection, test, source, files, _digest(train, selection, test))


def _assign(sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Names by split. The largest file always trains, so that no split but that one is swallowed by it."""
    want = sum(sizes.values()) / _HELD_OUT_SHARE
    largest = max(sizes, key=lambda name: sizes[name])
    files: dict[str, list[str]] = {"train": [], "selection": [], "test": []}
    for name in sizes:
        short = (split for split in ("selection", "test") if sum(sizes[each] for each in files[split]) < want)
        files["train" if name == largest else next(short, "train")].append(name)
    return {split: tuple(chosen) for split, chosen in files.items()}


def _split_by_block(path: Path) -> Corpus:
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")[:MOST_BYTES]
    except (OSError, ValueError) as error:
        # numpy's own word for an empty file is "cannot mmap an empty file".
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise ValueError(
            f"text path {path}: cannot be read ({reason}); give a file or a folder of text"
        ) from None
    held_out = max(1, len(content) // _HELD_OUT_SHARE)
    train, selection, test = np.split(content, [len(content) - 2 * held_out, len(content) - held_out])
    return Corpus(train, selection, test, f"the file {path}", {}, _digest(train, selection, test))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"text path {path}: cannot be read ({error.strerror})") from None


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _digest(*splits: Bytes) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(len(split).to_bytes(8, "big"))
        digest.update(split.data)
    return digest.hexdigest()
