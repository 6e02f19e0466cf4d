"""Softmax attention and gated feed-forward layers in turn: Llama, Mistral, Qwen2, Qwen3, Olmo3, DiffLlama."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors
from mixforge.checkpoints.layers import (
    Genes,
    Layer,
    attention,
    feed_forward,
    finish,
    rope,
    sizes,
    window,
)


def _layer_types(config: Config) -> tuple[str, ...]:
    """Which layers have a window. Classes without a list have it in none, or in all from `max_window_layers` on."""
    if "layer_types" in config:
        return config.names("layer_types")
    windowed = "sliding_window" in config and config.values.get("use_sliding_window", True)
    layers = config.whole("num_hidden_layers")
    full = min(config.whole("max_window_layers", 0), layers) if windowed else layers
    return ("full_attention",) * full + ("sliding_attention",) * (layers - full)


def _convert(config: Config, tensors: Tensors, place: str = "pre", differential: bool = False) -> Draft:
    draft = Draft()
    draft.words["place"] = place
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "the feed-forward layers are swiglu")
    tensors.drop("rotary_emb.inv_freq")
    norms = {
        "pre": ("before", "input_layernorm", "post_attention_layernorm"),
        "inside": ("inside", "post_attention_layernorm", "post_feedforward_layernorm"),
    }
    where, first, second = norms[place]
    for layer, layer_type in enumerate(_layer_types(config)):
        prefix = f"model.layers.{layer}"
        genes: Genes = {**sizes(config), **rope(config, layer_type), **window(config, layer_type)}
        text, weights = (_differential if differential else attention)(tensors, f"{prefix}.self_attn", genes)
        draft.add(text, weights, **{where: tensors.norm(f"{prefix}.{first}")})
        text, weights = feed_forward(tensors, f"{prefix}.mlp", width)
        draft.add(text, weights, **{where: tensors.norm(f"{prefix}.{second}")})
    return finish(draft, config, tensors)


def _differential(tensors: Tensors, prefix: str, genes: Genes) -> Layer:
    text, weights = attention(tensors, prefix, {**genes, "diff": "full"})
    lambdas = [[tensors.take(f"{prefix}.lambda_{side}{term}") for term in "12"] for side in "qk"]
    weights["output.difference.weight"] = torch.stack([torch.stack(pair) for pair in lambdas])
    # Its norm has no weights.
    weights["output.difference.norm.weight"] = torch.ones(2 * lambdas[0][0].shape[0])
    return text, weights


def _olmo3(config: Config, tensors: Tensors) -> Draft:
    return _convert(config, tensors, place="inside")


def _diffllama(config: Config, tensors: Tensors) -> Draft:
    return _convert(config, tensors, differential=True)


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {
    "llama": _convert,
    "mistral": _convert,
    "qwen2": _convert,
    "qwen3": _convert,
    "olmo3": _olmo3,
    "diffllama": _diffllama,
}
