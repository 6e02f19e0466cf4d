"""xLSTM-7B: mLSTM and gated feed-forward layers in turn.

The layer norm of mLSTM's heads has here an epsilon of 1e-5: the values are scaled so that it means the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors, pointwise
from mixforge.checkpoints.layers import Layer, call, finish
from mixforge.search_space.syntax import spell_number

HEAD_NORM_EPS = 1e-5


def _mlstm(config: Config, tensors: Tensors, prefix: str) -> Layer:
    heads = config.whole("num_heads")
    q, k, v = (tensors.take(f"{prefix}.{name}.weight") for name in "qkv")
    norm = tensors.norm(f"{prefix}.multihead_norm").view(heads, -1)
    weights = {
        "mixed.weight": torch.cat([q, k, (HEAD_NORM_EPS / config.number("norm_eps", 1e-6)) ** 0.5 * v]),
        "decay.logit.weight": tensors.take(f"{prefix}.fgate_preact.weight"),
        "decay.logit.bias": tensors.take(f"{prefix}.fgate_preact.bias"),
        "exp_gate.logit.weight": tensors.take(f"{prefix}.igate_preact.weight"),
        "exp_gate.logit.bias": tensors.take(f"{prefix}.igate_preact.bias"),
        "output.norm.weight": norm,
        "output.norm.bias": torch.zeros_like(norm),
        "output.gate.weight": tensors.take(f"{prefix}.ogate_preact.weight"),
        "output.out.weight": tensors.take(f"{prefix}.out_proj.weight"),
    }
    genes = {
        "heads": heads,
        "key_dim": len(q) // heads,
        "value_dim": len(v) // heads,
        "gate_cap": spell_number(config.number("gate_soft_cap", 15.0)),
    }
    return call("mlstm", genes), weights


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("weight_mode", "single", "the weights of a layer stand apart")
    config.must("use_bias", False, "projections and norms have no biases")
    config.must("eps", 1e-6, "what is added to mLSTM's normaliser is fixed")
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"backbone.blocks.{layer}"
        text, weights = _mlstm(config, tensors, f"{prefix}.mlstm_layer")
        draft.add(text, weights, before=tensors.norm(f"{prefix}.norm_mlstm"))
        gate, up, out = (
            tensors.take(f"{prefix}.ffn.proj_{name}.weight") for name in ("up_gate", "up", "down")
        )
        weights = pointwise({"gate.weight": gate, "up.weight": up, "out.weight": out})
        text = call("swiglu", {"expand": len(up) / width})
        draft.add(text, weights, before=tensors.norm(f"{prefix}.norm_ffn"))
    draft.words["softcap"] = spell_number(config.number("output_logit_soft_cap", 30.0))
    return finish(
        draft, config, tensors, norm="backbone.out_norm", embedding="backbone.embeddings", eps="norm_eps"
    )


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"xlstm": _convert}
