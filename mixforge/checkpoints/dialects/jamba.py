"""Jamba: Mamba with norms, attention without positions in some layers, experts in some feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors
from mixforge.checkpoints.layers import attention, experts, feed_forward, finish, selective, sizes


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "the feed-forward layers are swiglu")
    config.must("mamba_proj_bias", False, "the projections of Mamba's block have no biases")
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        if f"{prefix}.mamba.in_proj.weight" in tensors:
            text, weights = selective(tensors, f"{prefix}.mamba", config, width)
        else:
            genes = {**sizes(config), "pos": "none"}
            text, weights = attention(tensors, f"{prefix}.self_attn", genes)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm"))
        if f"{prefix}.feed_forward.router.weight" in tensors:
            chosen = {"top_k": config.whole("num_experts_per_tok"), "renorm": "none"}
            text, weights = experts(tensors, f"{prefix}.feed_forward", chosen, width, router="router")
        else:
            text, weights = feed_forward(tensors, f"{prefix}.feed_forward", width)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.pre_ff_layernorm"))
    return finish(draft, config, tensors, norm="model.final_layernorm")


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"jamba": _convert}
