"""Tiny configurations of transformers' classes, by name: what the oracles compare, and what a benchmark times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import (
    BambaConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    DiffLlamaConfig,
    FalconH1Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    KimiLinearConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    NemotronHConfig,
    Olmo3Config,
    OlmoHybridConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    Zamba2Config,
    xLSTMConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What the classes have in common. `width` is a multiple of 16 times the heads."""

    vocab: int = 97
    width: int = 64
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    window: int = 11

    @property
    def hidden(self) -> int:
        """Width of a feed-forward layer: no multiple of the model's."""
        return self.width * 7 // 4

    @property
    def names(self) -> dict[str, int]:
        """Under the names that nearly all classes have for them."""
        return {**self.bare, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}

    @property
    def bare(self) -> dict[str, int]:
        """Of a model without attention."""
        return {"vocab_size": self.vocab, "hidden_size": self.width, "num_hidden_layers": self.layers}

    @property
    def usual(self) -> dict[str, int]:
        """With the width of feed-forward layers."""
        return {**self.names, "intermediate_size": self.hidden}


def llama(size: Size) -> PretrainedConfig:
    return LlamaConfig(**size.usual)


def llama_tied(size: Size) -> PretrainedConfig:
    return LlamaConfig(**size.usual, tie_word_embeddings=True, rms_norm_eps=1e-5, attention_bias=True)


def mistral(size: Size) -> PretrainedConfig:
    return MistralConfig(**size.usual, sliding_window=size.window, head_dim=size.width // size.heads + 4)


def qwen2(size: Size) -> PretrainedConfig:
    return Qwen2Config(**size.usual)


def qwen3(size: Size) -> PretrainedConfig:
    return Qwen3Config(**size.usual, head_dim=size.width // size.heads + 4)


def olmo3(size: Size) -> PretrainedConfig:
    return Olmo3Config(**size.usual, sliding_window=size.window)


def diffllama(size: Size) -> PretrainedConfig:
    return DiffLlamaConfig(**size.usual)


def gpt_oss(size: Size) -> PretrainedConfig:
    return GptOssConfig(
        **size.usual,
        head_dim=size.width // size.heads,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=size.window,
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
    )


def mamba(size: Size) -> PretrainedConfig:
    return MambaConfig(**size.bare, state_size=8)


def mamba2(size: Size) -> PretrainedConfig:
    return Mamba2Config(
        **size.bare,
        state_size=16,
        num_heads=2 * size.heads,
        head_dim=size.width // size.heads,
        n_groups=2,
        chunk_size=16,
    )


def jamba(size: Size) -> PretrainedConfig:
    return JambaConfig(
        **size.usual,
        mamba_d_state=8,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=4,
        attn_layer_offset=2,
    )


def deepseek_v2(size: Size) -> PretrainedConfig:
    return DeepseekV2Config(
        **(size.usual | latent(size)),
        **mixture(size, experts=8),
        q_lora_rank=None,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
    )


def deepseek_v3(size: Size) -> PretrainedConfig:
    return DeepseekV3Config(
        **(size.usual | latent(size)),
        **mixture(size, experts=8),
        q_lora_rank=size.width // 2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
    )


def latent(size: Size) -> dict[str, int]:
    """Multi-head latent attention."""
    return {
        "num_key_value_heads": size.heads,
        "kv_lora_rank": size.width // 4,
        "qk_nope_head_dim": size.width // size.heads,
        "qk_rope_head_dim": size.width // size.heads // 2,
        "v_head_dim": size.width // size.heads,
    }


def mixture(size: Size, experts: int) -> dict[str, int]:
    """Routed and shared experts."""
    return {
        "n_routed_experts": experts,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": size.width // 2,
    }


def kimi_linear(size: Size) -> PretrainedConfig:
    return KimiLinearConfig(
        **(size.usual | latent(size)),
        num_local_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        moe_intermediate_size=size.width // 2,
        linear_num_heads=size.heads,
        linear_head_dim=size.width // size.heads,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        pad_token_id=None,
    )


def qwen3_next(size: Size) -> PretrainedConfig:
    return Qwen3NextConfig(
        **size.usual,
        head_dim=size.width // size.heads,
        linear_num_key_heads=size.heads // 2,
        linear_num_value_heads=size.heads,
        linear_key_head_dim=size.width // size.heads,
        linear_value_head_dim=size.width // size.heads,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=size.width // 2,
        shared_expert_intermediate_size=size.width // 2,
    )


def lfm2(size: Size) -> PretrainedConfig:
    return Lfm2Config(**size.usual, layer_types=["conv", "conv", "full_attention", "conv"])


def olmo_hybrid(size: Size) -> PretrainedConfig:
    return OlmoHybridConfig(
        **size.usual, rope_parameters={"rope_type": "default", "rope_theta": None}, pad_token_id=None
    )


def olmo_hybrid_rope(size: Size) -> PretrainedConfig:
    return OlmoHybridConfig(
        **size.usual,
        rms_norm_eps=1e-5,
        linear_allow_neg_eigval=False,
        layer_types=["linear_attention", "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        pad_token_id=None,
    )


def block2(size: Size) -> dict[str, object]:
    """Mamba-2's block, under the names that hybrids have for it."""
    return {
        "mamba_n_heads": 2 * size.heads,
        "mamba_d_head": size.width // size.heads,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    }


def bamba(size: Size) -> PretrainedConfig:
    return BambaConfig(**size.usual, **block2(size), attn_layer_indices=[2])


def falcon_h1(size: Size) -> PretrainedConfig:
    return FalconH1Config(
        **size.usual,
        **block2(size),
        mamba_d_ssm=2 * size.width,
        mamba_n_groups=2,
        embedding_multiplier=5.6,
        lm_head_multiplier=0.4,
        key_multiplier=0.4,
        attention_in_multiplier=1.5,
        attention_out_multiplier=0.8,
        mlp_multipliers=[0.9, 0.3],
        ssm_multipliers=[0.35, 0.25, 0.18, 0.5, 0.35],
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.2,
    )


def falcon_h1_norm(size: Size) -> PretrainedConfig:
    return FalconH1Config(
        **size.usual,
        **block2(size),
        mamba_d_ssm=2 * size.width,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
    )


def granite_hybrid(size: Size) -> PretrainedConfig:
    return GraniteMoeHybridConfig(
        **size.usual,
        **block2(size),
        num_local_experts=6,
        shared_intermediate_size=2 * size.hidden,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        embedding_multiplier=12.0,
        logits_scaling=6.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0078125,
        tie_word_embeddings=True,
    )


def nemotron_h(size: Size) -> PretrainedConfig:
    names = {name: value for name, value in size.usual.items() if name != "num_hidden_layers"}
    return NemotronHConfig(
        **names,
        head_dim=size.width // size.heads,
        layers_block_type=["linear_attention", "mlp", "linear_attention", "full_attention", "moe", "mlp"],
        ssm_state_size=16,
        mamba_num_heads=2 * size.heads,
        mamba_head_dim=size.width // size.heads,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=6,
        moe_intermediate_size=size.width // 2,
        moe_shared_expert_intermediate_size=size.width,
        num_nextn_predict_layers=0,
    )


def recurrent_gemma(size: Size) -> PretrainedConfig:
    return RecurrentGemmaConfig(
        **size.usual,
        attention_window_size=size.window,
        logits_soft_cap=5.0,
        pad_token_id=None,
    )


def recurrent_gemma_wide(size: Size) -> PretrainedConfig:
    return RecurrentGemmaConfig(
        **(size.usual | {"hidden_size": size.width + 16}),
        lru_width=2 * size.width,
        attention_bias=True,
        block_types=["recurrent", "attention"],
        attention_window_size=size.window,
        tie_word_embeddings=False,
        pad_token_id=None,
    )


def rwkv(size: Size) -> PretrainedConfig:
    return RwkvConfig(**size.bare, intermediate_size=size.hidden)


def minimax(size: Size) -> PretrainedConfig:
    return MiniMaxConfig(
        **size.usual,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        num_local_experts=6,
        block_size=16,
        full_attn_alpha_factor=3.5,
        linear_attn_alpha_factor=3.5,
        mlp_alpha_factor=3.5,
    )


def xlstm(size: Size) -> PretrainedConfig:
    return xLSTMConfig(**size.bare, num_heads=size.heads, chunk_size=16)


def zamba2(size: Size) -> PretrainedConfig:
    return Zamba2Config(
        **(size.usual | {"num_hidden_layers": 6, "num_key_value_heads": size.heads}),
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "hybrid"],
        n_mamba_heads=2 * size.heads,
        mamba_d_state=16,
        chunk_size=16,
        num_mem_blocks=2,
        use_shared_attention_adapter=True,
        adapter_rank=8,
        use_mem_rope=True,
        pad_token_id=None,
    )


def zamba2_one_block(size: Size) -> PretrainedConfig:
    return Zamba2Config(
        **size.usual,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        n_mamba_heads=2 * size.heads,
        mamba_d_state=16,
        mamba_ngroups=2,
        chunk_size=16,
        adapter_rank=8,
        hidden_act="gelu_pytorch_tanh",
        pad_token_id=None,
    )


CLASSES: dict[str, Callable[[Size], PretrainedConfig]] = {
    make.__name__: make
    for make in (
        llama,
        llama_tied,
        mistral,
        qwen2,
        qwen3,
        olmo3,
        diffllama,
        gpt_oss,
        mamba,
        mamba2,
        jamba,
        deepseek_v2,
        deepseek_v3,
        kimi_linear,
        qwen3_next,
        lfm2,
        olmo_hybrid,
        olmo_hybrid_rope,
        bamba,
        falcon_h1,
        falcon_h1_norm,
        granite_hybrid,
        nemotron_h,
        minimax,
        recurrent_gemma,
        recurrent_gemma_wide,
        rwkv,
        xlstm,
        zamba2,
        zamba2_one_block,
    )
}
"""A class's name, with what is particular about its configuration, to the function that makes it."""
