"""Tiny configurations of transformers' classes, by name: what the oracles compare, and what a benchmark times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import (
    DiffLlamaConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    Olmo3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
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
        n_groups=1,
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
    )
}
"""A class's name, with what is particular about its configuration, to the function that makes it."""
