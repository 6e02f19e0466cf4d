"""RecurrentGemma: gated linear recurrences, with local attention in every few layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors
from mixforge.checkpoints.layers import (
    Layer,
    attention,
    call,
    feed_forward,
    finish,
    projections,
    rope,
    sizes,
)
from mixforge.search_space.syntax import spell_number

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}


def _recurrence(config: Config, tensors: Tensors, prefix: str, activation: str) -> Layer:
    heads = config.whole("num_attention_heads")
    weights = projections(
        tensors,
        {"gate": f"{prefix}.linear_y", "into": f"{prefix}.linear_x", "out": f"{prefix}.linear_out"},
    )
    weights["conv.weight"] = tensors.take(f"{prefix}.conv_1d.weight")[:, 0]
    weights["conv.bias"] = tensors.take(f"{prefix}.conv_1d.bias")
    for ours, theirs in (("recurrence", "recurrent"), ("input", "input")):
        gate = f"{prefix}.rg_lru.{theirs}_gate"
        weights[f"cell.{ours}_gate.weight"] = tensors.take(f"{gate}_weight")
        weights[f"cell.{ours}_gate.bias"] = tensors.take(f"{gate}_bias").flatten()
    weights["cell.rate"] = rate = tensors.take(f"{prefix}.rg_lru.recurrent_param")
    genes = {
        "heads": heads,
        "head_dim": len(rate) // heads,
        "conv": weights["conv.weight"].shape[1],
        "gate": activation,
        "bias": "all",
    }
    return call("rglru", genes), weights


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    # What the class has where its configuration says nothing.
    config = Config({"partial_rotary_factor": 0.5, "tie_word_embeddings": True, **config.values})
    width = config.whole("hidden_size")
    activation = config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    genes = {**sizes(config), **rope(config), "window": config.whole("attention_window_size")}
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        block = f"{prefix}.temporal_block"
        if f"{block}.rg_lru.recurrent_param" in tensors:
            text, weights = _recurrence(config, tensors, block, activation)
        else:
            text, weights = attention(tensors, block, genes)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.temporal_pre_norm", from_one=True))
        text, weights = feed_forward(tensors, f"{prefix}.mlp_block", width, activation)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.channel_pre_norm", from_one=True))
    # The class keeps the root of the width in bfloat16.
    root = float(torch.tensor(math.sqrt(width), dtype=torch.bfloat16))
    draft.words |= {
        "embed_scale": spell_number(root),
        "softcap": spell_number(config.number("logits_soft_cap", 30.0)),
    }
    return finish(draft, config, tensors, norm="model.final_norm", from_one=True)


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"recurrent_gemma": _convert}
