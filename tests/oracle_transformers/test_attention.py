"""Attention against the attention classes of transformers: the same weights in both, outputs at once and by steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.diffllama import modeling_diffllama
from transformers.models.diffllama.configuration_diffllama import DiffLlamaConfig
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.parts.layer import Pass

WIDTH, LENGTH = 48, 29


def moved(module: nn.Module) -> dict[str, Tensor]:
    """Weights away from where they start, so that none can stand in another's place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + (weight.dim() == 1))
    return dict(module.state_dict())


def attended(theirs: nn.Module, rotary: nn.Module, x_BTD: Tensor, window: int) -> Tensor:
    position = torch.arange(LENGTH)
    seen = (position <= position[:, None]) & (position > position[:, None] - window)
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)
    y: Tensor = theirs(
        hidden_states=x_BTD, position_embeddings=rotary(x_BTD, position[None]), attention_mask=mask
    )[0]
    return y


@torch.no_grad()
def same(
    mixer: Attn, weights: dict[str, Tensor], theirs: nn.Module, rotary: nn.Module, window: int = LENGTH
) -> None:
    ours = mixer.build(WIDTH, "torch").build().eval()
    ours.load_state_dict(weights)
    x_BTD = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = attended(theirs.eval(), rotary, x_BTD, window)
    tolerance = 1e-4 * float(expected.square().mean().sqrt())
    whole, _ = ours(x_BTD, None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(whole, expected, rtol=0, atol=tolerance)
    state = ours.initial_state(2, LENGTH, x_BTD.device, x_BTD.dtype)
    half = LENGTH // 2
    pieces = [ours(x_BTD[:, :half], state, Pass(torch.arange(half), 0))[0]]
    for t in range(half, LENGTH):
        pieces.append(ours.step(x_BTD[:, t], state, Pass(torch.tensor([t]), 0))[0][:, None])
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=tolerance)


def turned_first(weight_FD: Tensor, heads: int, inner: int, rope_dim: int) -> Tensor:
    """Rows of each head [inner, rope_dim], turned pairs as neighbours, to [rope_dim, inner], pairs across halves."""
    rows = weight_FD.view(heads, inner + rope_dim, -1)
    pairs = rows[:, inner:].view(heads, rope_dim // 2, 2, -1).transpose(1, 2).flatten(1, 2)
    return torch.cat([pairs, rows[:, :inner]], 1).flatten(0, 1)


LATENT = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "qk_rope_head_dim": 8,
    "attn_implementation": "eager",
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("query_rank", [None, 16])
def test_latents_are_deepseeks(version: int, query_rank: int | None) -> None:
    if version == 2:
        config = DeepseekV2Config(**LATENT, q_lora_rank=query_rank)
        theirs: nn.Module = modeling_deepseek_v2.DeepseekV2Attention(config, 0)
        rotary: nn.Module = modeling_deepseek_v2.DeepseekV2RotaryEmbedding(config)
    else:
        config = DeepseekV3Config(**LATENT, q_lora_rank=query_rank)
        theirs = modeling_deepseek_v3.DeepseekV3Attention(config, 0)
        rotary = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
    w = moved(theirs)
    down = w["kv_a_proj_with_mqa.weight"]
    weights = {
        "memory.down.weight": turned_first(down, 1, 20, 8),
        "memory.norm.weight": w["kv_a_layernorm.weight"],
        "memory.up.weight": w["kv_b_proj.weight"],
        "output.out.weight": w["o_proj.weight"],
    }
    if query_rank is None:
        weights["queries.query.weight"] = turned_first(w["q_proj.weight"], 4, 12, 8)
    else:
        weights["queries.query.down.weight"] = w["q_a_proj.weight"]
        weights["queries.query.norm.weight"] = w["q_a_layernorm.weight"]
        weights["queries.query.up.weight"] = turned_first(w["q_b_proj.weight"], 4, 12, 8)
    mixer = Attn(heads=4, head_dim=12, kv=Form("mla", (20, 8)), query_rank=query_rank or "none")
    same(mixer, weights, theirs, rotary)


def usual(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections under the names that most classes have."""
    names = {
        "q_proj": "queries.query",
        "k_proj": "memory.key",
        "v_proj": "memory.value",
        "o_proj": "output.out",
        "q_norm": "queries.query_norm",
        "k_norm": "memory.key_norm",
    }
    return {
        f"{names[name]}.{kind}": weight
        for name, kind, weight in ((*key.split("."), weight) for key, weight in w.items() if "." in key)
        if name in names
    }


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_differences_are_diffllamas(kv_heads: int) -> None:
    config = DiffLlamaConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=kv_heads, rms_norm_eps=1e-6
    )
    config._attn_implementation = "eager"
    theirs = modeling_diffllama.DiffLlamaAttention(config, 2)
    w = moved(theirs)
    lambdas = [[w["lambda_q1"], w["lambda_q2"]], [w["lambda_k1"], w["lambda_k2"]]]
    for row in lambdas:
        for each in row:
            each.mul_(0.2)
    weights = usual(w) | {
        "output.difference.weight": torch.stack([torch.stack(row) for row in lambdas]),
        "output.difference.norm.weight": torch.ones(24),
    }
    mixer = Attn(heads=4, kv=Form("gqa", (kv_heads,)), diff="full").placed(2, 4)
    same(mixer, weights, theirs, modeling_diffllama.DiffLlamaRotaryEmbedding(config))


@pytest.mark.parametrize("window", [None, 8])
def test_sinks_are_those_of_gpt_oss(window: int | None) -> None:
    config = GptOssConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_hidden_layers=1,
        layer_types=["full_attention" if window is None else "sliding_attention"],
        sliding_window=window or 128,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    )
    config._attn_implementation = "eager"
    theirs = modeling_gpt_oss.GptOssAttention(config, 0)
    w = moved(theirs)
    mixer = Attn(
        heads=4, kv=Form("gqa", (2,)), bias="all", sink="learned", theta=150000.0, window=window or "none"
    )
    weights = usual(w) | {"scores.sink": w["sinks"]}
    same(mixer, weights, theirs, modeling_gpt_oss.GptOssRotaryEmbedding(config), window or LENGTH)


def test_norms_over_all_heads_are_those_of_olmo2() -> None:
    config = Olmo2Config(hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6)
    config._attn_implementation = "eager"
    theirs = modeling_olmo2.Olmo2Attention(config, 0)
    mixer = Attn(heads=4, kv=Form("gqa", (2,)), qk_norm="rms_all")
    same(mixer, usual(moved(theirs)), theirs, modeling_olmo2.Olmo2RotaryEmbedding(config))
