"""Multi-head latent attention and a mixture of experts: DeepSeek-V2 and V3; with Kimi delta attention: Kimi Linear.

Norms of latents have an epsilon of their own, 1e-6. Where the model's is another one, the projection before such a norm
is scaled by the root of their ratio, which is the same as another epsilon.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors, halves_from_pairs
from mixforge.checkpoints.layers import Genes, Layer, call, feed_forward, finish, mixture, rope

LATENT_EPS = 1e-6


def _latent(config: Config, tensors: Tensors, prefix: str, *, turns: bool, pairs: bool) -> Layer:
    heads, rank = config.whole("num_attention_heads"), config.whole("kv_lora_rank")
    inner, turning = config.whole("qk_nope_head_dim"), config.whole("qk_rope_head_dim")
    config.must("v_head_dim", inner, "values are as wide as the channels of a key that do not turn")
    config.must("attention_bias", False, "latent attention has no biases")
    factor = (config.number("rms_norm_eps", 1e-6) / LATENT_EPS) ** 0.5

    def turned_first(rows: Tensor, count: int, first: int) -> Tensor:
        """Rows [count * (first + turning), ...] with the turning ones of each head in front."""
        split = rows.view(count, first + turning, -1)
        turned = split[:, first:].reshape(count * turning, -1)
        turned = halves_from_pairs(turned, count) if pairs else turned
        return torch.cat([turned.view(count, turning, -1), split[:, :first]], 1).flatten(0, 1)

    down = tensors.take(f"{prefix}.kv_a_proj_with_mqa.weight")
    down = torch.cat([factor * down[:rank], down[rank:]])
    weights = {
        "memory.down.weight": turned_first(down, 1, rank),
        "memory.norm.weight": tensors.norm(f"{prefix}.kv_a_layernorm"),
        "memory.up.weight": tensors.take(f"{prefix}.kv_b_proj.weight"),
        "output.out.weight": tensors.take(f"{prefix}.o_proj.weight"),
    }
    genes: Genes = {"heads": heads, "head_dim": inner, "kv": f"mla({rank}, {turning})"}
    genes |= rope(config) if turns else {"pos": "none"}
    if "q_lora_rank" in config:
        genes["query_rank"] = config.whole("q_lora_rank")
        low = tensors.take(f"{prefix}.q_a_proj.weight")
        weights["queries.query.down.weight"] = factor * low
        weights["queries.query.norm.weight"] = tensors.norm(f"{prefix}.q_a_layernorm")
        query, name = tensors.take(f"{prefix}.q_b_proj.weight"), "queries.query.up.weight"
    else:
        query, name = tensors.take(f"{prefix}.q_proj.weight"), "queries.query.weight"
    weights[name] = turned_first(query, heads, inner)
    return call("attn", genes), weights


def _delta(tensors: Tensors, prefix: str) -> Layer:
    """Kimi delta attention."""
    rate = tensors.take(f"{prefix}.A_log").flatten()
    out, low = tensors.take(f"{prefix}.o_proj.weight"), tensors.take(f"{prefix}.g_a_proj.weight")
    gate = tensors.take(f"{prefix}.g_b_proj.weight")
    conv = [tensors.take(f"{prefix}.{name}_conv1d.weight") for name in "qkv"]
    weights = {
        "mixed.weight": torch.cat([tensors.take(f"{prefix}.{name}_proj.weight") for name in "qkv"]),
        "conv.weight": torch.cat(conv)[:, 0],
        "decay.down.weight": tensors.take(f"{prefix}.f_a_proj.weight"),
        "decay.up.weight": tensors.take(f"{prefix}.f_b_proj.weight"),
        "decay.bias": tensors.take(f"{prefix}.dt_bias").flatten(),
        "decay.rate": rate,
        "beta.logit.weight": tensors.take(f"{prefix}.b_proj.weight"),
        "output.norm.weight": tensors.norm(f"{prefix}.o_norm"),
        "output.gate.down.weight": low,
        "output.gate.up.weight": gate,
        "output.gate.up.bias": torch.zeros(len(gate)),
        "output.out.weight": out,
    }
    genes: Genes = {
        "heads": len(rate),
        "key_dim": len(gate) // len(rate),
        "value_dim": len(gate) // len(rate),
        "conv": weights["conv.weight"].shape[1],
        "forget_rank": len(weights["decay.down.weight"]),
        "gate_rank": len(low),
    }
    return call("kda", genes), weights


def _convert(config: Config, tensors: Tensors, mixer: Callable[[str], Layer], routing: Genes) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "the feed-forward layers are swiglu")
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        tensors.rename(f"{prefix}.block_sparse_moe.", f"{prefix}.mlp.")
        text, weights = mixer(f"{prefix}.self_attn")
        draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm"))
        if f"{prefix}.mlp.gate.weight" in tensors:
            text, weights = mixture(config, tensors, f"{prefix}.mlp", routing)
        else:
            text, weights = feed_forward(tensors, f"{prefix}.mlp", width)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.post_attention_layernorm"))
    return finish(draft, config, tensors)


def _deepseek_v2(config: Config, tensors: Tensors) -> Draft:
    methods = {"greedy": "none", "group_limited_greedy": "best"}
    is_grouped = config.choice("topk_method", methods, "greedy") == "best"
    # The class does not read norm_topk_prob.
    routing: Genes = {"renorm": "none", **({} if is_grouped else {"groups": "none"})}
    return _convert(
        config, tensors, lambda prefix: _latent(config, tensors, prefix, turns=True, pairs=True), routing
    )


def _deepseek_v3(config: Config, tensors: Tensors) -> Draft:
    pairs = config.flag("rope_interleave", True)
    return _convert(
        config,
        tensors,
        lambda prefix: _latent(config, tensors, prefix, turns=True, pairs=pairs),
        {},
    )


# Names that Kimi Linear gives to what DeepSeek has too.
KIMI_NAMES = {
    "num_experts_per_token": "num_experts_per_tok",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
}


def _kimi_linear(config: Config, tensors: Tensors) -> Draft:
    config = Config({KIMI_NAMES.get(name, name): value for name, value in config.values.items()})

    def mixer(prefix: str) -> Layer:
        if f"{prefix}.A_log" in tensors:
            return _delta(tensors, prefix)
        return _latent(config, tensors, prefix, turns=False, pairs=False)

    return _convert(config, tensors, mixer, {})


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "kimi_linear": _kimi_linear,
}
