"""Qwen3-Next: gated delta rule, gated attention in every few layers, and a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors
from mixforge.checkpoints.layers import (
    Layer,
    attention,
    call,
    experts,
    feed_forward,
    finish,
    rope,
    sizes,
)


def _attention(config: Config, tensors: Tensors, prefix: str) -> Layer:
    """The rows of q_proj are, for each head, its query and then its gate."""
    config.must("attention_bias", False, "the gate has no bias")
    heads = config.whole("num_attention_heads")
    both = tensors.take(f"{prefix}.q_proj.weight")
    query, gate = (part.flatten(0, 1) for part in both.view(heads, -1, both.shape[1]).chunk(2, 1))
    tensors.put(f"{prefix}.q_proj.weight", query)
    genes = {**sizes(config), **rope(config), "out_gate": "sigmoid"}
    text, weights = attention(tensors, prefix, genes, from_one=True)
    return text, {**weights, "output.gate.weight": gate}


def _delta(config: Config, tensors: Tensors, prefix: str) -> Layer:
    """The rows of in_proj_qkvz and in_proj_ba go by key heads."""
    key_heads, heads = config.whole("linear_num_key_heads"), config.whole("linear_num_value_heads")
    key_dim, value_dim = config.whole("linear_key_head_dim"), config.whole("linear_value_head_dim")
    values = heads // key_heads * value_dim

    def by_part(name: str, sizes: list[int]) -> list[Tensor]:
        rows = tensors.take(f"{prefix}.{name}.weight")
        split = torch.split(rows.view(key_heads, sum(sizes), -1), sizes, 1)
        return [part.flatten(0, 1) for part in split]

    q, k, v, z = by_part("in_proj_qkvz", [key_dim, key_dim, values, values])
    b, a = by_part("in_proj_ba", [heads // key_heads] * 2)
    weights = {
        "mixed.weight": torch.cat([q, k, v]),
        "conv.weight": tensors.take(f"{prefix}.conv1d.weight")[:, 0],
        "decay.step_size.weight": a,
        "decay.bias": tensors.take(f"{prefix}.dt_bias"),
        "decay.rate": tensors.take(f"{prefix}.A_log"),
        "beta.logit.weight": b,
        "output.gate.weight": z,
        "output.norm.weight": tensors.norm(f"{prefix}.norm"),
        "output.out.weight": tensors.take(f"{prefix}.out_proj.weight"),
    }
    genes = {
        "heads": heads,
        "key_heads": key_heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "conv": weights["conv.weight"].shape[1],
    }
    return call("gdn", genes), weights


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "the feed-forward layers are swiglu")
    renorm = "sum" if config.flag("norm_topk_prob", True) else "none"
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        if f"{prefix}.linear_attn.A_log" in tensors:
            text, weights = _delta(config, tensors, f"{prefix}.linear_attn")
        else:
            text, weights = _attention(config, tensors, f"{prefix}.self_attn")
        draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm", from_one=True))
        if f"{prefix}.mlp.gate.weight" in tensors:
            chosen = {"top_k": config.whole("num_experts_per_tok"), "renorm": renorm}
            text, weights = experts(tensors, f"{prefix}.mlp", chosen, width)
        else:
            text, weights = feed_forward(tensors, f"{prefix}.mlp", width)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.post_attention_layernorm", from_one=True))
    return finish(draft, config, tensors, from_one=True)


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"qwen3_next": _convert}
