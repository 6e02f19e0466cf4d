"""A trained model's weights as a safetensors file: whole or not there, and known to be what was written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

_NOTE = "mixforge"


def save_weights(model: nn.Module, path: Path, about: dict[str, str] | None = None) -> None:
    """Write a model's weights, each once, with a digest. `about` goes into the file's metadata, as JSON.

    The file is written beside its place, synced and moved there, so that a kill or a full disk leaves the
    old one. Raises OSError.
    """
    tensors = _tensors(model)
    # One entry, for safetensors writes several in no fixed order, and equal weights are to be equal files.
    note = json.dumps({**(about or {}), "sha256": _digest(tensors)}, sort_keys=True)
    content = save(tensors, metadata={_NOTE: note})
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's file is its owner's alone; weights are for whoever may read the folder.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_weights(model: nn.Module, path: Path) -> None:
    """Read weights into the model that they were saved from. A file from elsewhere has no digest to be held against.

    Raises ValueError where the file is not there, is damaged, or belongs to another architecture.
    """
    tensors = _read(path)
    mine = _tensors(model)
    if tensors.keys() != mine.keys():
        odd = sorted(tensors.keys() ^ mine.keys())
        raise ValueError(f"weights {path} belong to another architecture: {odd[0]} is in only one of the two")
    for name, tensor in mine.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"weights {path} belong to another architecture: {name} is {list(tensors[name].shape)}, "
                f"the model's is {list(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in _tensors(model, detach=False).items():
            tensor.copy_(tensors[name])


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            note = json.loads((file.metadata() or {}).get(_NOTE, "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"weights {path} cannot be read: {error}") from None
    if "sha256" in note and note["sha256"] != _digest(tensors):
        raise ValueError(
            f"weights {path} are damaged: their sha256 is not the one that was written with them"
        )
    return tensors


def _tensors(model: nn.Module, detach: bool = True) -> dict[str, Tensor]:
    """Parameters and kept buffers by name; one that is used in several places has its first name only."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous() if detach else tensor
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
