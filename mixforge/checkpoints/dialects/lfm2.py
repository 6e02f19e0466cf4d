"""LFM2: gated short convolutions, with attention in some layers."""

from __future__ import annotations

from collections.abc import Callable

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors, pointwise
from mixforge.checkpoints.layers import Layer, attention, call, finish, rope, sizes


def _convolution(tensors: Tensors, prefix: str) -> Layer:
    weights = {
        "mixed.weight": tensors.take(f"{prefix}.in_proj.weight"),
        "conv.weight": tensors.take(f"{prefix}.conv.weight")[:, 0],
        "out.weight": tensors.take(f"{prefix}.out_proj.weight"),
    }
    return call("conv", {"size": weights["conv.weight"].shape[1]}), weights


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("conv_bias", False, "a gated convolution has no biases")
    genes = {**sizes(config), **rope(config)}
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        if f"{prefix}.conv.conv.weight" in tensors:
            text, weights = _convolution(tensors, f"{prefix}.conv")
        else:
            tensors.rename(f"{prefix}.self_attn.out_proj.", f"{prefix}.self_attn.o_proj.")
            for side in "qk":
                tensors.rename(f"{prefix}.self_attn.{side}_layernorm.", f"{prefix}.self_attn.{side}_norm.")
            text, weights = attention(tensors, f"{prefix}.self_attn", genes)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.operator_norm"))
        gate, up, out = (tensors.take(f"{prefix}.feed_forward.{name}.weight") for name in ("w1", "w3", "w2"))
        weights = pointwise({"gate.weight": gate, "up.weight": up, "out.weight": out})
        draft.add(
            call("swiglu", {"expand": len(up) / width}), weights, before=tensors.norm(f"{prefix}.ffn_norm")
        )
    return finish(draft, config, tensors, norm="model.embedding_norm", eps="norm_eps")


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"lfm2": _convert}
