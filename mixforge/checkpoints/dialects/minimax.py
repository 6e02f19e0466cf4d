"""MiniMax-01: lightning attention with softmax attention in some layers, experts, and norms after each unit.

Where the class keeps another form, an equal one is said:
- Its stream is normed before a unit and it is the normed stream that goes on: these are norms after units, the first of
  them, of the embeddings, being applied to their table once and for all. The last norm stands both after the last unit,
  without weights, and before the head.
- The factors of a residual, alpha x + beta f(x), are beta / alpha on what ends the branch: the norm that follows does not
  see a common factor.
- The norm of lightning attention has an epsilon of its own, 1e-6, of an output that is not divided by sqrt(K). All norms
  have 1e-6 / K, and the stream is scaled so that its norms mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors
from mixforge.checkpoints.layers import Genes, Layer, attention, call, experts, rope, sizes
from mixforge.search_space.syntax import spell_number

LIGHTNING_EPS = 1e-6
INTO = (
    "query.weight",
    "key.weight",
    "value.weight",
    "mixed.weight",
    "gate.weight",
    "logits.weight",
    "up.weight",
)


def _lightning(config: Config, tensors: Tensors, prefix: str) -> Layer:
    heads = config.whole("num_attention_heads")
    # The rows of qkv_proj go by heads.
    rows = tensors.take(f"{prefix}.qkv_proj.weight")
    q, k, v = (part.flatten(0, 1) for part in rows.view(heads, -1, rows.shape[1]).chunk(3, 1))
    weights = {
        "mixed.weight": torch.cat([q, k, v]),
        "output.gate.weight": tensors.take(f"{prefix}.output_gate.weight"),
        "output.norm.weight": tensors.norm(f"{prefix}.norm"),
        "output.out.weight": tensors.take(f"{prefix}.out_proj.weight"),
    }
    for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"):
        tensors.drop(f"{prefix}.{name}")
    dim = len(q) // heads
    genes = {"heads": heads, "key_dim": dim, "value_dim": dim}
    return call("lightning", genes), weights


def _folded(weights: dict[str, Tensor], stream: float, branch: float) -> dict[str, Tensor]:
    """For a stream that is `stream` times as large, and a branch that is `branch` times as large beside it."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        is_out = name.endswith("out.weight")
        factor = stream * branch if is_out else 1 / stream if name.endswith(INTO) else 1.0
        found[name] = factor * value
    return found


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "lightning attention and the experts have SiLU")
    config.must("tie_word_embeddings", False, "the embeddings have a norm of their own")
    config.must("sliding_window", None, "every token is seen")
    eps = config.number("rms_norm_eps", 1e-5)
    genes = {**sizes(config), **rope(config)}
    layers = config.whole("num_hidden_layers")
    lightning = [f"model.layers.{layer}.self_attn.qkv_proj.weight" in tensors for layer in range(layers)]
    ours = LIGHTNING_EPS / int(str(genes["head_dim"])) if any(lightning) else eps
    stream = math.sqrt(ours / eps)
    norms = [
        tensors.norm(f"model.layers.{layer}.{name}_layernorm")
        for layer in range(layers)
        for name in ("input", "post_attention")
    ]
    for layer, is_lightning in enumerate(lightning):
        prefix = f"model.layers.{layer}"
        if is_lightning:
            text, weights = _lightning(config, tensors, f"{prefix}.self_attn")
        else:
            text, weights = attention(tensors, f"{prefix}.self_attn", genes)
        after = stream * norms[2 * layer + 1]
        kind = "linear" if is_lightning else "full"
        draft.add(text, _folded(weights, stream, _residual(config, f"{kind}_attn")), after=after)
        chosen: Genes = {"top_k": config.whole("num_experts_per_tok")}
        text, weights = experts(tensors, f"{prefix}.block_sparse_moe", chosen, width)
        last = layer == layers - 1
        after = torch.ones(width) if last else stream * norms[2 * layer + 2]
        draft.add(text, _folded(weights, stream, _residual(config, "mlp")), after=after)
    table = tensors.take("model.embed_tokens.weight").float()
    table = table * (table.square().mean(-1, keepdim=True) + eps).rsqrt() * norms[0]
    draft.words |= {"place": "post", "eps": spell_number(ours)}
    draft.ends(stream * table, tensors.norm("model.norm"), tensors.take("lm_head.weight"))
    return draft


def _residual(config: Config, kind: str) -> float:
    return config.number(f"{kind}_beta_factor", 1.0) / config.number(f"{kind}_alpha_factor", 1.0)


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"minimax": _convert}
