"""Mamba and Mamba-2."""

from __future__ import annotations

from collections.abc import Callable

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors
from mixforge.checkpoints.layers import Layer, duality, finish, selective


def _convert(config: Config, tensors: Tensors, mixer: Callable[[Config, Tensors, str], Layer]) -> Draft:
    draft = Draft()
    config.must("hidden_act", "silu", "Mamba's block has SiLU")
    config.must("use_bias", False, "its projections have no biases")
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"backbone.layers.{layer}"
        text, weights = mixer(config, tensors, f"{prefix}.mixer")
        draft.add(text, weights, before=tensors.norm(f"{prefix}.norm"))
    return finish(
        draft,
        config,
        tensors,
        norm="backbone.norm_f",
        embedding="backbone.embeddings",
        eps="layer_norm_epsilon",
    )


def _selective(config: Config, tensors: Tensors, prefix: str) -> Layer:
    return selective(tensors, prefix, config, config.whole("hidden_size"))


def _duality(config: Config, tensors: Tensors, prefix: str) -> Layer:
    return duality(
        tensors,
        prefix,
        heads=config.whole("num_heads"),
        groups=config.whole("n_groups"),
        states=config.whole("state_size"),
    )


def _mamba(config: Config, tensors: Tensors) -> Draft:
    return _convert(config, tensors, _selective)


def _mamba2(config: Config, tensors: Tensors) -> Draft:
    config.unlimited("time_step_limit")
    return _convert(config, tensors, _duality)


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"mamba": _mamba, "mamba2": _mamba2}
