"""Layers that many classes of checkpoints have, under the names that most of them give their tensors.

Each function takes the tensors of one layer and gives the mixer's expression and its weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors, pointwise
from mixforge.search_space.syntax import spell_number

Layer = tuple[str, dict[str, Tensor]]
Genes = dict[str, object]


def call(mixer: str, genes: Mapping[str, object]) -> str:
    """The expression of a mixer."""
    return f"{mixer}({', '.join(f'{name}={value}' for name, value in genes.items())})"


def sizes(config: Config) -> Genes:
    """Genes of an attention layer that are the same in all of a model's layers."""
    count = config.whole("num_attention_heads")
    return {
        "heads": count,
        "head_dim": config.whole("head_dim", config.whole("hidden_size") // count),
        "kv": f"gqa({config.whole('num_key_value_heads', count)})",
    }


def rope(config: Config, layer_type: str | None = None) -> Genes:
    """The genes of rotary position."""
    share = config.rope(layer_type).number(
        "partial_rotary_factor", config.number("partial_rotary_factor", 1.0)
    )
    theta = spell_number(config.theta(layer_type=layer_type))
    return {"pos": "rope", "theta": theta, **({} if share == 1 else {"rotary": share})}


def window(config: Config, layer_type: str) -> Genes:
    """The window of a layer of this type."""
    known = {"full_attention": "none", "sliding_attention": "window"}
    if layer_type not in known:
        raise ValueError(
            f"config.json: layer_types has {layer_type!r}; what can be said is {', '.join(known)}"
        )
    return {} if known[layer_type] == "none" else {"window": config.whole("sliding_window")}


def attention(tensors: Tensors, prefix: str, genes: Genes, *, from_one: bool = False) -> Layer:
    """Query, key, value and output projections; biases, norms of queries and keys, and sinks where there are."""
    weights = projections(
        tensors,
        {
            "queries.query": f"{prefix}.q_proj",
            "memory.key": f"{prefix}.k_proj",
            "memory.value": f"{prefix}.v_proj",
            "output.out": f"{prefix}.o_proj",
        },
    )
    if f"{prefix}.q_norm.weight" in tensors:
        weights["queries.query_norm.weight"] = norm = tensors.norm(f"{prefix}.q_norm", from_one=from_one)
        weights["memory.key_norm.weight"] = tensors.norm(f"{prefix}.k_norm", from_one=from_one)
        is_whole = norm.shape[0] == weights["queries.query.weight"].shape[0] and genes["heads"] != 1
        genes = {**genes, "qk_norm": "rms_all" if is_whole else "rms"}
    if f"{prefix}.sinks" in tensors:
        weights["scores.sink"] = tensors.take(f"{prefix}.sinks")
        genes = {**genes, "sink": "learned"}
    return call("attn", {**genes, **biased(weights)}), weights


def projections(tensors: Tensors, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights and, where there are, biases of linear layers: our names by theirs."""
    found: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        found[f"{ours}.weight"] = tensors.take(f"{theirs}.weight")
        if f"{theirs}.bias" in tensors:
            found[f"{ours}.bias"] = tensors.take(f"{theirs}.bias")
    return found


def biased(weights: dict[str, Tensor]) -> Genes:
    """The gene of the biases that an attention layer has. Those that it has not are zeros where others ask for them."""
    within = ("queries.query", "memory.key", "memory.value")
    has_out = "output.out.bias" in weights
    if not has_out and not any(f"{name}.bias" in weights for name in within):
        return {}
    for name in within:
        weights.setdefault(f"{name}.bias", torch.zeros(len(weights[f"{name}.weight"])))
    return {"bias": "all" if has_out else "qkv"}


def feed_forward(tensors: Tensors, prefix: str, width: int, act: str = "silu") -> Layer:
    """A gated unit, with biases where there are."""
    names = {"gate": f"{prefix}.gate_proj", "up": f"{prefix}.up_proj", "out": f"{prefix}.down_proj"}
    weights = projections(tensors, names)
    genes: Genes = {"act": act, "expand": len(weights["up.weight"]) / width}
    if "up.bias" in weights:
        genes["bias"] = "all"
    return call("glu", genes), pointwise(weights)


def experts(tensors: Tensors, prefix: str, genes: Genes, width: int, *, router: str = "gate") -> Layer:
    """Routed experts without biases, and shared ones where there are, of SwiGLU.

    The experts are stacked, or stand one by one as `experts.0.gate_proj` or `experts.0.w1`.
    """
    weights = {"router.logits.weight": tensors.take(f"{prefix}.{router}.weight")}
    up, out = _stacked(tensors, f"{prefix}.experts", len(weights["router.logits.weight"]))
    weights |= {"experts.up.weight": up, "experts.out.weight": out}
    hidden = out.shape[2]
    genes = {"experts": len(up), "expand": hidden / width, **genes}
    for name in ("shared_experts", "shared_expert"):
        shared = f"{prefix}.{name}"
        if f"{shared}.up_proj.weight" not in tensors:
            continue
        lift = tensors.take(f"{shared}.up_proj.weight")
        if len(lift) % hidden != 0:
            raise ValueError(
                f"the shared experts of {prefix} are {len(lift)} wide, which is no multiple of the routed ones' "
                f"{hidden}: a mixture of experts has experts of one width"
            )
        genes["shared"] = len(lift) // hidden
        gate = [tensors.take(f"{shared}.gate_proj.weight")] if f"{shared}.gate_proj.weight" in tensors else []
        weights["shared.up.weight"] = torch.cat([*gate, lift])
        weights["shared.out.weight"] = tensors.take(f"{shared}.down_proj.weight")
    if f"{prefix}.shared_expert_gate.weight" in tensors:
        genes["shared_gate"] = "sigmoid"
        weights["shared_gate.weight"] = tensors.take(f"{prefix}.shared_expert_gate.weight")
    return call("moe", genes), weights


def mixture(config: Config, tensors: Tensors, prefix: str, genes: Genes) -> Layer:
    """DeepSeek's routing, under its names for what it follows; `genes` are what is known of it."""
    groups, kept = config.whole("n_group", 1), config.whole("topk_group", 1)
    found: Genes = {
        "top_k": config.whole("num_experts_per_tok"),
        "scale": config.number("routed_scaling_factor", 1.0),
        "renorm": "sum" if config.flag("norm_topk_prob", True) else "none",
        "groups": "none" if groups == 1 else f"best({kept}, {groups})",
    }
    bias = f"{prefix}.gate.e_score_correction_bias"
    more = {}
    if bias in tensors:
        more["router.bias"] = tensors.take(bias)
        found |= {"score": "sigmoid", "balance": "bias"}
    text, weights = experts(tensors, prefix, found | genes, config.whole("hidden_size"))
    return text, weights | more


def _stacked(tensors: Tensors, prefix: str, count: int) -> tuple[Tensor, Tensor]:
    """up [E, 2 F, D], the gate's rows first, or [E, F, D] without a gate, and out [E, D, F]."""
    if f"{prefix}.down_proj" in tensors:
        up = "gate_up_proj" if f"{prefix}.gate_up_proj" in tensors else "up_proj"
        return tensors.take(f"{prefix}.{up}"), tensors.take(f"{prefix}.down_proj")
    plain = f"{prefix}.0.up_proj.weight" in tensors
    gate, up, out = ("gate_proj", "up_proj", "down_proj") if plain else ("w1", "w3", "w2")

    def all_of(name: str) -> Tensor:
        return torch.stack([tensors.take(f"{prefix}.{expert}.{name}.weight") for expert in range(count)])

    has_gate = f"{prefix}.0.{gate}.weight" in tensors
    return torch.cat([*([all_of(gate)] if has_gate else []), all_of(up)], 1), all_of(out)


def selective(tensors: Tensors, prefix: str, config: Config, width: int) -> Layer:
    """Mamba's block. `config` has the names of transformers' Mamba."""
    into = tensors.take(f"{prefix}.in_proj.weight")
    weights = {
        "into.weight": into,
        "conv.weight": tensors.take(f"{prefix}.conv1d.weight")[:, 0],
        "scan.selection.selection.weight": tensors.take(f"{prefix}.x_proj.weight"),
        "scan.selection.step_size.weight": (low := tensors.take(f"{prefix}.dt_proj.weight")),
        "scan.selection.bias": tensors.take(f"{prefix}.dt_proj.bias"),
        "scan.selection.rate": (rate := tensors.take(f"{prefix}.A_log")),
        "scan.selection.skip": tensors.take(f"{prefix}.D"),
        "out.weight": tensors.take(f"{prefix}.out_proj.weight"),
    }
    inner, states = rate.shape
    usual = -(-width // 16)
    if low.shape[1] != usual:
        raise ValueError(
            f"config.json: the rank of dt is {low.shape[1]}, and only width / 16 = {usual} can be said"
        )
    has_bias = f"{prefix}.conv1d.bias" in tensors
    weights["conv.bias"] = tensors.take(f"{prefix}.conv1d.bias") if has_bias else torch.zeros(inner)
    genes: Genes = {"state": states, "expand": inner / width, "conv": weights["conv.weight"].shape[1]}
    if f"{prefix}.dt_layernorm.weight" in tensors:
        genes["norm"] = "dt_b_c"
        for place, name in enumerate(("dt", "b", "c")):
            weights[f"scan.selection.norms.{place}.weight"] = tensors.norm(f"{prefix}.{name}_layernorm")
    return call("ssm", genes), weights


def duality(tensors: Tensors, prefix: str, *, heads: int, groups: int, states: int) -> Layer:
    """Mamba-2's block. The rows of in_proj are z, x, B, C and dt."""
    into, conv = tensors.take(f"{prefix}.in_proj.weight"), tensors.take(f"{prefix}.conv1d.weight")[:, 0]
    keys = groups * states
    inner = len(conv) - 2 * keys
    z, x, b, c, dt = torch.split(into, [inner, inner, keys, keys, heads])

    def mixed(rows: Tensor) -> Tensor:
        """Queries, keys and values, which are C, B and x."""
        x_rows, b_rows, c_rows = torch.split(rows, [inner, keys, keys])
        return torch.cat([c_rows, b_rows, x_rows])

    weights = {
        "mixed.weight": torch.cat([c, b, x]),
        "conv.weight": mixed(conv),
        "decay.step_size.weight": dt,
        "decay.bias": tensors.take(f"{prefix}.dt_bias"),
        "decay.rate": tensors.take(f"{prefix}.A_log"),
        "skip.weight": tensors.take(f"{prefix}.D"),
        "output.gate.weight": z,
        "output.out.weight": tensors.take(f"{prefix}.out_proj.weight"),
    }
    genes: Genes = {
        "heads": heads,
        "key_heads": groups,
        "key_dim": states,
        "value_dim": inner // heads,
        "conv": conv.shape[1],
    }
    if f"{prefix}.norm.weight" in tensors:
        weights["output.norm.weight"] = tensors.norm(f"{prefix}.norm")
        # The norm is of each group's channels, after the gate.
        genes["out_norm"] = "gated" if groups == 1 else "grouped"
    else:
        genes["out_norm"] = "none"
    if f"{prefix}.conv1d.bias" in tensors:
        weights["conv.bias"] = mixed(tensors.take(f"{prefix}.conv1d.bias"))
        genes["bias"] = "conv"
    return call("mamba2", genes), weights


def finish(
    draft: Draft,
    config: Config,
    tensors: Tensors,
    *,
    norm: str = "model.norm",
    embedding: str = "model.embed_tokens",
    eps: str = "rms_norm_eps",
    from_one: bool = False,
) -> Draft:
    """Embedding, last norm and head, and the number under the root of all norms."""
    draft.words["eps"] = spell_number(config.number(eps, 1e-6))
    table = tensors.take(f"{embedding}.weight")
    tied = config.flag("tie_word_embeddings", False)
    if tied and "lm_head.weight" in tensors:
        tensors.take("lm_head.weight")
    head = None if tied else tensors.take("lm_head.weight")
    draft.ends(table, tensors.norm(norm, from_one=from_one), head)
    return draft
