"""RWKV-4. Its first norm, of the embeddings, is applied to the table of embeddings once and for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors
from mixforge.checkpoints.layers import Layer, call
from mixforge.search_space.syntax import spell_number


def _time(tensors: Tensors, prefix: str) -> Layer:
    weights = {
        "decay": tensors.take(f"{prefix}.time_decay"),
        "bonus": tensors.take(f"{prefix}.time_first"),
        "key.weight": tensors.take(f"{prefix}.key.weight"),
        "value.weight": tensors.take(f"{prefix}.value.weight"),
        "receptance.weight": tensors.take(f"{prefix}.receptance.weight"),
        "out.weight": tensors.take(f"{prefix}.output.weight"),
    }
    return "rwkv4", weights | _shares(tensors, prefix, "receptance", "key", "value")


def _channels(tensors: Tensors, prefix: str) -> Layer:
    up = tensors.take(f"{prefix}.key.weight")
    weights = {
        "up.weight": up,
        "receptance.weight": tensors.take(f"{prefix}.receptance.weight"),
        "out.weight": tensors.take(f"{prefix}.value.weight"),
    }
    text = call("rwkv", {"expand": up.shape[0] / up.shape[1]})
    return text, weights | _shares(tensors, prefix, "key", "receptance")


def _shares(tensors: Tensors, prefix: str, *names: str) -> dict[str, Tensor]:
    """Shares of the token before, where the checkpoint has those of the token itself."""
    own = [tensors.take(f"{prefix}.time_mix_{name}").flatten() for name in names]
    return {"shift.share": 1 - torch.stack(own)}


def _norm(tensors: Tensors, prefix: str) -> tuple[Tensor, Tensor]:
    return tensors.take(f"{prefix}.weight"), tensors.take(f"{prefix}.bias")


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("attention_hidden_size", width, "time mixing is as wide as the model")
    config.must("tie_word_embeddings", False, "the embeddings have a norm of their own")
    eps = config.number("layer_norm_epsilon", 1e-5)
    # rescale_every divides weights and the stream alike, which no norm and no output sees.
    first = _norm(tensors, "rwkv.blocks.0.pre_ln")
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"rwkv.blocks.{layer}"
        for place, (text, weights) in enumerate(
            (_time(tensors, f"{prefix}.attention"), _channels(tensors, f"{prefix}.feed_forward")), start=1
        ):
            norm, bias = _norm(tensors, f"{prefix}.ln{place}")
            draft.add(text, weights, before=norm)
            draft.weights[f"stack.units.{len(draft.units) - 1}.before.bias"] = bias
    table = tensors.take("rwkv.embeddings.weight").float()
    norm, bias = _norm(tensors, "rwkv.ln_out")
    draft.words |= {"norm": "layer", "eps": spell_number(eps)}
    draft.ends(F.layer_norm(table, (width,), *first, eps), norm, tensors.take("head.weight"))
    draft.weights["norm.bias"] = bias
    return draft


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {"rwkv": _convert}
