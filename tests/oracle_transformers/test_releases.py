"""Checkpoints as they were released, where transformers itself would store them under other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from classes import CLASSES, Size
from comparison import model_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixforge.checkpoints.checkpoint import read

Weights = dict[str, Tensor]


def _olmo_hybrid(stored: Weights) -> Weights:
    """The class's own names of norms, and convolutions that end where queries, keys and values do."""
    found: Weights = {}
    for name, value in stored.items():
        name = name.replace("attention_layer_norm", "input_layernorm")
        found[name.replace(".feedforward_layer_norm", ".post_attention_layernorm")] = value
    for layer in range(3):
        prefix = f"model.layers.{layer}.linear_attn"
        names = [f"{prefix}.{part}_conv1d.weight" for part in "qkv"]
        sizes = [len(found[f"{prefix}.{part}_proj.weight"]) for part in "qkv"]
        parts = torch.split(torch.cat([found[name] for name in names]), sizes)
        found |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return found


def _zamba2(stored: Weights) -> Weights:
    """What places share, once for every place."""
    shared = [(name, value) for name, value in stored.items() if ".layers.1.shared_transformer." in name]
    again = {name.replace(".layers.1.", ".layers.4."): value.clone() for name, value in shared}
    return {**stored, **again}


@pytest.mark.parametrize(("name", "as_released"), [("olmo_hybrid", _olmo_hybrid), ("zamba2", _zamba2)])
def test_a_release_is_the_same_checkpoint(
    name: str, as_released: Callable[[Weights], Weights], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model_of(CLASSES[name](Size())).save_pretrained(tmp_path)
    expected = read(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    released = as_released(stored)
    assert released.keys() != stored.keys()
    save_file(released, tmp_path / "model.safetensors")
    found = read(tmp_path)
    assert found.architecture == expected.architecture
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(value, expected.weights[name]) for name, value in found.weights.items())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("recurrent_gemma", {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}),
        ("recurrent_gemma", {"rope_theta": 10_000.0}),
        ("zamba2", {"rope_theta": 10_000}),
    ],
)
def test_a_release_says_less_in_its_configuration(
    name: str, config: dict[str, float], tmp_path: Path
) -> None:
    """Positions as they were said before `rope_parameters`, and nothing of embeddings that are the head's."""
    torch.manual_seed(0)
    model_of(CLASSES[name](Size())).save_pretrained(tmp_path)
    expected = read(tmp_path).architecture
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"], values["tie_word_embeddings"]
    path.write_text(json.dumps({**values, **config}))
    assert read(tmp_path).architecture == expected
