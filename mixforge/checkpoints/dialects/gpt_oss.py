"""GPT-OSS: attention with sinks and biases, in windows in every second layer, and experts of clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors
from mixforge.checkpoints.layers import Layer, attention, call, finish, rope, sizes, window
from mixforge.search_space.syntax import spell_number


def _experts(config: Config, tensors: Tensors, prefix: str) -> Layer:
    # [E, D, 2 F] and [E, 2 F]: gate and up take turns.
    up = tensors.take(f"{prefix}.experts.gate_up_proj").transpose(1, 2)
    bias = tensors.take(f"{prefix}.experts.gate_up_proj_bias")
    down = tensors.take(f"{prefix}.experts.down_proj").transpose(1, 2)
    weights = {
        "router.logits.weight": tensors.take(f"{prefix}.router.weight"),
        "router.logits.bias": tensors.take(f"{prefix}.router.bias"),
        "experts.up.weight": _halves(up),
        "experts.up.bias": _halves(bias),
        "experts.out.weight": down.contiguous(),
        "experts.out.bias": tensors.take(f"{prefix}.experts.down_proj_bias"),
    }
    genes = {
        "experts": len(up),
        "top_k": config.whole("num_experts_per_tok"),
        "act": f"clamped({spell_number(config.number('swiglu_limit', 7.0))})",
        "expand": down.shape[2] / config.whole("hidden_size"),
        "bias": "all",
    }
    return call("moe", genes), weights


def _halves(rows: Tensor) -> Tensor:
    return torch.cat([rows[:, ::2], rows[:, 1::2]], 1)


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    config.must("swiglu_alpha", 1.702, "clamped SwiGLU has this number")
    for layer, layer_type in enumerate(config.names("layer_types")):
        prefix = f"model.layers.{layer}"
        genes = {**sizes(config), **rope(config), **window(config, layer_type)}
        text, weights = attention(tensors, f"{prefix}.self_attn", genes)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm"))
        text, weights = _experts(config, tensors, f"{prefix}.mlp")
        draft.add(text, weights, before=tensors.norm(f"{prefix}.post_attention_layernorm"))
    return finish(draft, config, tensors)


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"gpt_oss": _convert}
