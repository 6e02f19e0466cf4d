"""Llama, Mistral and Qwen3 against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison import assert_same
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, tie_word_embeddings=False),
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        MistralConfig(**SIZES, sliding_window=11, head_dim=16),
        Qwen3Config(**SIZES, head_dim=20),
    ],
    ids=["llama", "llama-tied", "mistral", "qwen3"],
)
def test_logits_and_steps_agree(config: PretrainedConfig, tmp_path: Path) -> None:
    assert_same(config, tmp_path)
