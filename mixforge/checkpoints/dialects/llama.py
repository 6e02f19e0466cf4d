"""Softmax attention and gated feed-forward layers in turn: Llama, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors, pointwise


def feed_forward(tensors: Tensors, prefix: str, width: int) -> tuple[str, dict[str, Tensor]]:
    """SwiGLU under Hugging Face's usual names, as an expression and its weights."""
    gate, up, down = (tensors.take(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
    weights = {"gate.weight": gate, "up.weight": up, "out.weight": down}
    return f"swiglu(expand={gate.shape[0] / width})", pointwise(weights)


def attention(tensors: Tensors, prefix: str, genes: dict[str, object]) -> tuple[str, dict[str, Tensor]]:
    """Query, key, value and output projections under the usual names; norms of queries and keys where there are."""
    weights = {
        "queries.query.weight": tensors.take(f"{prefix}.q_proj.weight"),
        "memory.key.weight": tensors.take(f"{prefix}.k_proj.weight"),
        "memory.value.weight": tensors.take(f"{prefix}.v_proj.weight"),
        "output.out.weight": tensors.take(f"{prefix}.o_proj.weight"),
    }
    if f"{prefix}.q_norm.weight" in tensors:
        weights["queries.query_norm.weight"] = tensors.norm(f"{prefix}.q_norm")
        weights["memory.key_norm.weight"] = tensors.norm(f"{prefix}.k_norm")
        genes = {**genes, "qk_norm": "rms"}
    return f"attn({', '.join(f'{name}={value}' for name, value in genes.items())})", weights


def heads(config: Config) -> dict[str, object]:
    """Genes of the sizes of an attention layer."""
    count = config.whole("num_attention_heads")
    theta = config.theta()
    return {
        **({} if theta == 10_000 else {"theta": f"{theta:g}"}),
        "heads": count,
        "head_dim": config.whole("head_dim", config.whole("hidden_size") // count),
        "kv": f"gqa({config.whole('num_key_value_heads', count)})",
    }


def finish(draft: Draft, config: Config, tensors: Tensors, norm: str = "model.norm") -> Draft:
    """Embedding, last norm and head under the usual names."""
    eps = config.number("rms_norm_eps", 1e-6)
    if eps != 1e-6:
        draft.words["eps"] = f"{eps:g}"
    embedding = tensors.take("model.embed_tokens.weight")
    tied = config.flag("tie_word_embeddings", False)
    if tied and "lm_head.weight" in tensors:
        tensors.take("lm_head.weight")
    draft.ends(embedding, tensors.norm(norm), None if tied else tensors.take("lm_head.weight"))
    return draft


def _convert(config: Config, tensors: Tensors) -> Draft:
    draft = Draft()
    width = config.whole("hidden_size")
    config.must("hidden_act", "silu", "the feed-forward layers are swiglu")
    tensors.drop("rotary_emb.inv_freq")
    genes = heads(config)
    windowed = "sliding_window" in config and config.values.get("use_sliding_window", True)
    if windowed:
        genes["window"] = config.whole("sliding_window")
    for layer in range(config.whole("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        text, weights = attention(tensors, f"{prefix}.self_attn", genes)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.input_layernorm"))
        text, weights = feed_forward(tensors, f"{prefix}.mlp", width)
        draft.add(text, weights, before=tensors.norm(f"{prefix}.post_attention_layernorm"))
    return finish(draft, config, tensors)


MODEL_TYPES: dict[str, Callable[[Config, Tensors], Draft]] = {
    "llama": _convert,
    "mistral": _convert,
    "qwen3": _convert,
}
