"""Mamba-2 and attention: Bamba, Falcon-H1, Granite 4 and Nemotron-H.

Their multipliers are folded into the weights next to them: those of residual branches into what ends a branch, that of
the logits into the last norm, that of the scores into the queries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors, branch, pointwise
from mixforge.checkpoints.layers import (
    Genes,
    Layer,
    attention,
    call,
    duality,
    feed_forward,
    finish,
    mixture,
    rope,
    sizes,
)
from mixforge.search_space.syntax import spell_number

Weights = dict[str, Tensor]


def _mamba2(config: Config, tensors: Tensors, prefix: str) -> Layer:
    """Under the names that Bamba, Falcon-H1 and Granite have for its sizes."""
    config.must("mamba_proj_bias", False, "the projections of Mamba-2's block have no biases")
    config.unlimited("time_step_limit")
    return duality(
        tensors,
        prefix,
        heads=config.whole("mamba_n_heads"),
        groups=config.whole("mamba_n_groups"),
        states=config.whole("mamba_d_state"),
    )


def _scaled(weights: Weights, factor: float, *endings: str) -> None:
    """Multiply the weights whose names end so."""
    if factor != 1:
        for name in [name for name in weights if name.endswith(endings)]:
            weights[name] = factor * weights[name]


def _last(draft: Draft, config: Config, logits: float, embedding: str) -> Draft:
    """The multipliers of embedding and logits, of a model whose ends have been read."""
    scale = config.number(embedding, 1.0)
    if scale != 1:
        draft.words["embed_scale"] = spell_number(scale)
    draft.weights["norm.weight"] = logits * draft.weights["norm.weight"]
    return draft


def _bamba(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "the feed-forward layers are swiglu")
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        if f"{prefix}.mamba.A_log" in tensors:
            text, weights = _mamba2(config, tensors, f"{prefix}.mamba")
        else:
            text, weights = attention(tensors, f"{prefix}.self_attn", {**sizes(config), **rope(config)})
        draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm"))
        text, weights = feed_forward(tensors, f"{prefix}.feed_forward", width)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.pre_ff_layernorm"))
    return finish(draft, config, tensors, norm="model.final_layernorm")


def _falcon_h1(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "the feed-forward layers are swiglu")
    of_gate, of_down = config.numbers("mlp_multipliers", 2)
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        text, weights = _beside(config, tensors, prefix)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm"))
        text, weights = feed_forward(tensors, f"{prefix}.feed_forward", width)
        _scaled(weights, of_gate, "gate.weight", "gate.bias")
        _scaled(weights, of_down, "out.weight", "out.bias")
        draft.add(text, weights, before=tensors.norm(f"{prefix}.pre_ff_layernorm"))
    finish(draft, config, tensors, norm="model.final_layernorm")
    return _last(draft, config, config.number("lm_head_multiplier", 1.0), "embedding_multiplier")


def _beside(config: Config, tensors: Tensors, prefix: str) -> Layer:
    """Attention and Mamba-2 of the same input, added up."""
    config.must("attention_bias", False, "a multiplier of the input would not reach the biases")
    text, weights = attention(tensors, f"{prefix}.self_attn", {**sizes(config), **rope(config)})
    into = config.number("attention_in_multiplier", 1.0)
    _scaled(weights, into, "query.weight", "key.weight", "value.weight")
    _scaled(weights, config.number("key_multiplier", 1.0), "key.weight")
    _scaled(weights, config.number("attention_out_multiplier", 1.0), "out.weight")
    before = config.number("ssm_in_multiplier", 1.0)
    scales = [before * each for each in config.numbers("ssm_multipliers", 5)]
    into_rows = tensors.take(f"{prefix}.mamba.in_proj.weight")
    heads, groups = config.whole("mamba_n_heads"), config.whole("mamba_n_groups")
    keys = groups * config.whole("mamba_d_state")
    inner = (len(into_rows) - heads - 2 * keys) // 2
    parts = torch.split(into_rows, [inner, inner, keys, keys, heads])
    folded = [scale * part for scale, part in zip(scales, parts, strict=True)]
    tensors.put(f"{prefix}.mamba.in_proj.weight", torch.cat(folded))
    other, more = _mamba2(config, tensors, f"{prefix}.mamba")
    is_first = config.flag("mamba_rms_norm", False) and config.flag("mamba_norm_before_gate", True)
    if is_first and groups > 1:
        raise ValueError(
            f"config.json: mamba_n_groups is {groups}, and with mamba_norm_before_gate only 1 can be said"
        )
    if is_first:
        other = other.replace("out_norm=gated", "out_norm=joint")
    _scaled(more, config.number("ssm_out_multiplier", 1.0), "out.weight")
    # Branches stand in their order, which is that of their names.
    return f"beside({text}, {other}, fuse=sum)", {**branch(0, weights), **branch(1, more)}


def _granite(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "the experts are swiglu")
    residual = config.number("residual_multiplier", 1.0)
    genes = {**sizes(config), **_granite_position(config)}
    scale = config.number("attention_multiplier", 1.0) * int(str(genes["head_dim"])) ** 0.5
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        if f"{prefix}.mamba.A_log" in tensors:
            text, weights = _mamba2(config, tensors, f"{prefix}.mamba")
        else:
            text, weights = attention(tensors, f"{prefix}.self_attn", genes)
            _scaled(weights, scale, "query.weight", "query.bias")
        _scaled(weights, residual, "out.weight", "out.bias")
        draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm"))
        text, weights = _granite_channels(config, tensors, prefix, width)
        _scaled(weights, residual, "out.weight")
        draft.add(text, weights, before=tensors.norm(f"{prefix}.post_attention_layernorm"))
    finish(draft, config, tensors)
    return _last(draft, config, 1 / config.number("logits_scaling", 1.0), "embedding_multiplier")


def _granite_position(config: Config) -> Genes:
    return rope(config) if config.values.get("position_embedding_type") == "rope" else {"pos": "none"}


def _granite_channels(config: Config, tensors: Tensors, prefix: str, width: int) -> Layer:
    """One gated unit for every token, and experts beside it where there are."""
    up, out = (tensors.take(f"{prefix}.shared_mlp.{name}_linear.weight") for name in ("input", "output"))
    router = f"{prefix}.block_sparse_moe.router.layer.weight"
    if router not in tensors:
        gate, lift = up.chunk(2)
        weights = pointwise({"gate.weight": gate, "up.weight": lift, "out.weight": out})
        return call("swiglu", {"expand": out.shape[1] / width}), weights
    moe = f"{prefix}.block_sparse_moe"
    inputs = tensors.take(f"{moe}.input_linear.weight")
    outputs = tensors.take(f"{moe}.output_linear.weight")
    weights = {
        "router.logits.weight": tensors.take(router),
        "experts.up.weight": inputs,
        "experts.out.weight": outputs,
        "shared.up.weight": up,
        "shared.out.weight": out,
    }
    hidden = outputs.shape[2]
    if out.shape[1] % hidden != 0:
        raise ValueError(
            f"config.json: shared_intermediate_size is {out.shape[1]}, and only a multiple of the experts' {hidden} can "
            "be said"
        )
    genes = {
        "experts": len(inputs),
        "top_k": config.whole("num_experts_per_tok"),
        "shared": out.shape[1] // hidden,
        "expand": hidden / width,
    }
    return call("moe", genes), weights


def _nemotron_h(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("mamba_hidden_act", "silu", "Mamba-2's block has SiLU")
    config.must("moe_latent_size", None, "experts are as wide as the model at their ends")
    config.must("use_bias", False, "the projections of Mamba-2's block have no biases")
    config.must("num_nextn_predict_layers", 0, "the model predicts one token")
    config.unlimited("time_step_limit")
    activation = config.choice("mlp_hidden_act", {"relu2": "relu2", "silu": "silu", "gelu": "gelu"}, "relu2")
    layers = 0
    while f"backbone.layers.{layers}.norm.weight" in tensors:
        prefix = f"backbone.layers.{layers}"
        text, weights = _nemotron_mixer(config, tensors, f"{prefix}.mixer", width, activation)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.norm"))
        layers += 1
    return finish(
        draft,
        config,
        tensors,
        norm="backbone.norm_f",
        embedding="backbone.embeddings",
        eps="layer_norm_epsilon",
    )


def _nemotron_mixer(config: Config, tensors: Tensors, prefix: str, width: int, activation: str) -> Layer:
    if f"{prefix}.A_log" in tensors:
        return duality(
            tensors,
            prefix,
            heads=config.whole("mamba_num_heads"),
            groups=config.whole("n_groups"),
            states=config.whole("ssm_state_size"),
        )
    if f"{prefix}.q_proj.weight" in tensors:
        return attention(tensors, prefix, {**sizes(config), "pos": "none"})
    if f"{prefix}.gate.weight" in tensors:
        return mixture(config, tensors, prefix, {"act": activation})
    config.must("mlp_bias", False, "feed-forward layers of this class are read without biases")
    up, out = (tensors.take(f"{prefix}.{name}_proj.weight") for name in ("up", "down"))
    weights = pointwise({"up.weight": up, "out.weight": out})
    return call("mlp", {"act": activation, "expand": len(up) / width}), weights


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
    "granitemoehybrid": _granite,
    "nemotron_h": _nemotron_h,
}
