"""Export: an architecture and its weights become a folder that runs without this package.

The folder is written beside its place, checked there in a process that cannot import this package, and then
renamed: it is there whole and checked, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from mixforge.evaluator.weights import load_weights
from mixforge.export import check
from mixforge.export.card import Card, write_card
from mixforge.export.model_file import write_model_file
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.model import LanguageModel, language_model

# Of a logit, in float32. The exported model repeats the searched one's sums; a step adds up in another order.
TOLERANCES: Mapping[str, float] = {"searched": 1e-5, "step": 1e-4, "resumed": 1e-4, "future": 1e-5}
_CHECK_S = 300
# Longer than most windows and chunks of a small model, and no multiple of either.
_CHECK_TOKENS = 149


class ExportError(RuntimeError):
    """The export failed; no folder was left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A folder that was written and checked."""

    folder: Path
    files: Mapping[str, int]
    """Their sizes in bytes, by name."""
    params: int
    weights_sha256: str
    differences: Mapping[str, float]
    """Largest absolute differences of float32 logits, by the names in `check`."""


def export(
    architecture: Architecture, weights: Path | None, folder: Path, card: Card, *, seed: int = 0
) -> Exported:
    """Write model.py, config.json, model.safetensors and CARD.md into a new `folder`.

    `weights` is a safetensors file of the built model's state; None draws them from `seed`. Raises ValueError
    where the folder exists, the architecture does not read bytes or the weights are not its own, and
    ExportError where the disk refuses or the written model does not do what the searched one does.
    """
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists; give a folder that does not exist yet")
    if architecture.vocab != 256:
        raise ValueError(f"an exported model reads bytes, so its vocab must be 256, not {architecture.vocab}")
    searched = _searched(architecture, weights, seed)
    with beside(folder) as written:
        sha256 = write_files(architecture, searched, written)
        (differences,) = verify([(searched, written)])
        text = write_card(architecture, card, digest_of_weights=sha256, differences=differences)
        _store(written / "CARD.md", text.encode())
        _sync(written)
        try:
            written.rename(folder)
        except OSError as error:
            raise ExportError(f"cannot rename {written} to {folder}: {error.strerror}") from error
        _sync(folder.parent)
    return Exported(
        folder=folder,
        files={file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        params=sum(parameter.numel() for parameter in searched.parameters()),
        weights_sha256=sha256,
        differences=differences,
    )


def _searched(architecture: Architecture, weights: Path | None, seed: int) -> LanguageModel:
    model = architecture.build(backend="torch", seed=seed)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A new folder beside where `folder` goes; a rename completes it, any other way out removes it."""
    # mkdtemp would hide it from everybody else: the umask decides who may read an export.
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise ExportError(f"cannot write beside {folder}: {error.strerror}") from error
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_files(architecture: Architecture, searched: LanguageModel, folder: Path) -> str:
    """Write model.py, config.json and model.safetensors. Returns the sha256 of the weights."""
    part = language_model(architecture, "torch")
    params = sum(parameter.numel() for parameter in searched.parameters())
    source = write_model_file(part, text=str(architecture), digest=architecture.digest, params=params)
    weights = safetensors.torch.save(
        {name: value.contiguous() for name, value in searched.state_dict().items()}
    )
    sha256 = hashlib.sha256(weights).hexdigest()
    config = {
        "architecture": str(architecture),
        "digest": architecture.digest,
        "canonical": json.loads(architecture.canonical_json),
        "vocab": architecture.vocab,
        "width": architecture.width,
        "params": params,
        "tokens": "bytes",
        "weights_sha256": sha256,
    }
    _store(folder / "model.py", source.encode())
    _store(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    _store(folder / "model.safetensors", weights)
    return sha256


def verify(
    pairs: Sequence[tuple[LanguageModel, Path]], *, length: int = _CHECK_TOKENS
) -> list[dict[str, float]]:
    """Run `check` on searched models and their folders, on `length` tokens behind a prefix, in one fresh process.

    Raises ExportError where a model.py does not run by itself or a difference is too large.
    """
    random = torch.Generator().manual_seed(0)
    command = [sys.executable, "-I", "-B", check.__file__, str(torch.get_num_threads())]
    with torch.no_grad(), tempfile.TemporaryDirectory() as place:
        for number, (searched, folder) in enumerate(pairs):
            tokens_BT = torch.randint(searched.vocab, (2, searched.prefix + length), generator=random)
            evidence = Path(place, f"{number}.safetensors")
            _store(
                evidence, safetensors.torch.save({"tokens_BT": tokens_BT, "logits_BTX": searched(tokens_BT)})
            )
            command += [str(folder), str(evidence)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"the exported model was not checked within {_CHECK_S} s") from error
    if ran.returncode != 0:
        raise ExportError(f"the exported model does not run by itself:\n{ran.stderr.strip()}")
    found: list[dict[str, float]] = [json.loads(line) for line in ran.stdout.splitlines()]
    for differences, (_, folder) in zip(found, pairs, strict=True):
        wrong = {name: value for name, value in differences.items() if not value <= TOLERANCES[name]}
        if wrong:
            listed = ", ".join(
                f"{name} {v:.1e} (at most {TOLERANCES[name]:.0e})" for name, v in wrong.items()
            )
            raise ExportError(f"{folder}: the exported model's logits differ: {listed}")
    return found


def _store(path: Path, content: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ExportError(
            f"cannot write {len(content):,} bytes to {path.parent.parent}: {error.strerror}"
        ) from error


def _sync(folder: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
