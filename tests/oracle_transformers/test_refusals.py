"""Settings of known classes that cannot be said are named when their checkpoint is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from classes import CLASSES, Size
from comparison import model_of
from transformers import PretrainedConfig

from mixforge.checkpoints.checkpoint import read


def _yarn(config: PretrainedConfig) -> None:
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def _set(name: str, value: object) -> Callable[[PretrainedConfig], None]:
    return lambda config: setattr(config, name, value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", _yarn, "rope_type is 'yarn', and only 'default'"),
        ("gpt_oss", _yarn, "rope_type is 'yarn', and only 'default'"),
        ("mamba", _set("use_bias", True), "use_bias is True, and only False can be said"),
        ("mamba", _set("time_step_rank", 3), "the rank of dt is 3, and only width / 16 = 4"),
        ("mamba2", _set("time_step_limit", [0.01, 1.0]), "time_step_limit is .*only .0, infinity."),
        ("deepseek_v3", _set("v_head_dim", 8), "v_head_dim is 8, and only 16 can be said"),
        ("qwen3_next", _set("shared_expert_intermediate_size", 40), "40 wide, which is no multiple"),
        ("lfm2", _set("conv_bias", True), "conv_bias is True, and only False"),
        ("olmo_hybrid", _set("attention_bias", True), "attention_bias is True, and only False"),
        (
            "recurrent_gemma",
            _set("hidden_activation", "relu"),
            "hidden_activation is 'relu'; what can be said",
        ),
        ("zamba2", _set("add_bias_linear", True), "add_bias_linear is True, and only False"),
        ("zamba2", _set("rms_norm_eps", 1e-6), "rms_norm_eps is 1e-06, and only 1e-05"),
        ("xlstm", _set("use_bias", True), "use_bias is True, and only False"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_setting_that_cannot_be_said_is_named(
    name: str, change: Callable[[PretrainedConfig], None], message: str, tmp_path: Path
) -> None:
    config = CLASSES[name](Size())
    change(config)
    model_of(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
