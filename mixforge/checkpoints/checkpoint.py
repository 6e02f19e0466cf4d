"""A published checkpoint becomes an architecture and its weights: `read("path/to/llama")`.

A checkpoint is a folder in the form of Hugging Face: config.json, and model.safetensors or its shards. Only these files
are read: no code of theirs runs, and neither transformers nor a network is needed. What comes out computes the same
logits, or the checkpoint is refused: every tensor and every setting that bears on the result is either said or named in
the error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.dialects import DIALECTS
from mixforge.checkpoints.draft import Tensors
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.count import counted
from mixforge.search_space.model import LanguageModel
from mixforge.search_space.syntax import nearest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """What was read."""

    architecture: Architecture
    weights: Mapping[str, Tensor]
    """The state of the model that `architecture.build()` makes."""
    model_type: str
    """As config.json names its class."""

    def build(self) -> LanguageModel:
        """The model with these weights, in float32."""
        model = self.architecture.build()
        model.load_state_dict({name: value.float() for name, value in self.weights.items()})
        return model


def read(folder: Path) -> Checkpoint:
    """Raises ValueError where the folder is no checkpoint, or one that cannot be said."""
    values = _read_config(folder)
    model_type = str(values.get("model_type"))
    if model_type not in DIALECTS:
        known = f"known: {', '.join(sorted(DIALECTS))}{nearest(model_type, DIALECTS)}"
        raise ValueError(f"{folder}: checkpoints of model_type '{model_type}' cannot be said; {known}")
    tensors = Tensors(_read_tensors(folder))
    try:
        draft = DIALECTS[model_type](Config(values), tensors)
        architecture = draft.architecture()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if tensors.left:
        some = ", ".join(sorted(tensors.left)[:3])
        raise ValueError(
            f"{folder}: {architecture} has no place for {counted(len(tensors.left), 'tensor')}, such as {some}; "
            "the checkpoint has parts that cannot be said"
        )
    return Checkpoint(architecture=architecture, weights=draft.weights, model_type=model_type)


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; give the folder of a Hugging Face checkpoint"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no configuration: it holds a {type(values).__name__}")
    # A model of several kinds of input keeps its language model's settings one table further in.
    inner = values.get("text_config")
    return {**inner, "model_type": inner.get("model_type", "")} if isinstance(inner, dict) else values


def _read_shards(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in found})
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of shards: {error!r}; it maps tensors to files under weight_map"
        ) from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = _read_shards(index) if index.exists() else ["model.safetensors"]
    found: dict[str, Tensor] = {}
    for name in names:
        # A name from a file must not lead out of the folder.
        path = folder / Path(name).name
        try:
            with safe_open(path, framework="pt") as file:
                found |= {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}; weights must be safetensors files") from None
    return found
