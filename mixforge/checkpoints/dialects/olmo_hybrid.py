"""Olmo Hybrid: the gated delta rule with norms before it, and attention in every few layers with norms after it.

The norm of the delta rule's heads has an epsilon of its own. All norms have it here, and the stream is scaled so that the
others mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors
from mixforge.checkpoints.layers import Genes, Layer, attention, call, feed_forward, finish, rope, sizes
from mixforge.search_space.syntax import spell_number

HEAD_NORM_EPS = 1e-5


def _delta(config: Config, tensors: Tensors, prefix: str) -> Layer:
    heads, key_heads = config.whole("linear_num_value_heads"), config.whole("linear_num_key_heads")
    q, k, v = (tensors.take(f"{prefix}.{name}_proj.weight") for name in "qkv")
    weights = {
        "mixed.weight": torch.cat([q, k, v]),
        # In three parts: those of queries, keys and values in the releases, equal ones as transformers stores them.
        "conv.weight": torch.cat([tensors.take(f"{prefix}.{name}_conv1d.weight")[:, 0] for name in "qkv"]),
        "decay.step_size.weight": tensors.take(f"{prefix}.a_proj.weight"),
        "decay.bias": tensors.take(f"{prefix}.dt_bias"),
        "decay.rate": tensors.take(f"{prefix}.A_log"),
        "beta.logit.weight": tensors.take(f"{prefix}.b_proj.weight"),
        "output.gate.weight": tensors.take(f"{prefix}.g_proj.weight"),
        "output.norm.weight": tensors.norm(f"{prefix}.o_norm"),
        "output.out.weight": tensors.take(f"{prefix}.o_proj.weight"),
    }
    genes = {
        "heads": heads,
        "key_heads": key_heads,
        "key_dim": len(q) // key_heads,
        "value_dim": len(v) // heads,
        "conv": weights["conv.weight"].shape[1],
        "beta": 2 if config.flag("linear_allow_neg_eigval", True) else 1,
    }
    return call("gdn", genes), weights


def _position(config: Config) -> Genes:
    """Published checkpoints have none, which they say by a base that is null."""
    return {"pos": "none"} if config.rope().values.get("rope_theta", "") is None else rope(config)


def _scaled(weights: dict[str, Tensor], into: float, out: float) -> dict[str, Tensor]:
    """What reads a stream that nothing norms, and what ends the branch. Queries and keys have norms."""
    factors = {"value": into, "gate": into, "up": into, "out": out}
    parts = {name: name.removesuffix(".weight").rpartition(".")[2] for name in weights}
    return {name: factors.get(parts[name], 1.0) * value for name, value in weights.items()}


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "the feed-forward layers are swiglu")
    config.must("attention_bias", False, "a factor of the stream would not reach the biases")
    stream = math.sqrt(HEAD_NORM_EPS / config.number("rms_norm_eps", 1e-6))
    genes = {**sizes(config), **_position(config)}
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        # transformers stores them under these names; the releases have those of the class.
        tensors.rename(f"{prefix}.attention_layer_norm.", f"{prefix}.input_layernorm.")
        tensors.rename(f"{prefix}.feedforward_layer_norm.", f"{prefix}.post_attention_layernorm.")
        after = tensors.norm(f"{prefix}.post_attention_layernorm")
        if f"{prefix}.linear_attn.A_log" in tensors:
            text, weights = _delta(config, tensors, f"{prefix}.linear_attn")
            weights["output.out.weight"] = stream * weights["output.out.weight"]
            draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm"))
            text, weights = feed_forward(tensors, f"{prefix}.mlp", width)
            draft.add(text, _scaled(weights, 1.0, stream), before=after)
            continue
        text, weights = attention(tensors, f"{prefix}.self_attn", genes)
        inside = f"residual({text}, place=inside)"
        draft.add(inside, _scaled(weights, 1 / stream, stream), inside=stream * after)
        text, weights = feed_forward(tensors, f"{prefix}.mlp", width)
        last = stream * tensors.norm(f"{prefix}.post_feedforward_layernorm")
        draft.add(f"residual({text}, place=inside)", _scaled(weights, 1 / stream, stream), inside=last)
    finish(draft, config, tensors)
    draft.words["eps"] = spell_number(HEAD_NORM_EPS)
    if "readout.weight" not in draft.weights:
        draft.words["embed"] = "untied"
        draft.weights["readout.weight"] = draft.weights["embedding.weight"]
    draft.weights["embedding.weight"] = stream * draft.weights["embedding.weight"]
    return draft


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"olmo_hybrid": _convert}
