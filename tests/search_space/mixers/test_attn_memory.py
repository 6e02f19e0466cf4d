"""Keys and values of attention against the papers that change how they are made and kept."""

from __future__ import annotations

import torch
from attention_oracle import (
    LENGTH,
    WIDTH,
    agree,
    attention,
    built,
    by_steps,
    projected,
    rms,
    rope,
    split,
    tokens,
)
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn


def latent_attention(
    x_TD: Tensor, w: dict[str, Tensor], heads: int, dim: int, rope_dim: int, turns: bool
) -> Tensor:
    """DeepSeek-V2, equations 9 to 19: keys and values of every head made of one latent, and one turned key for all."""
    down_TF = x_TD @ w["memory.down.weight"].T
    c_TR = rms(down_TF[:, rope_dim:], w["memory.norm.weight"])
    r_T1K = split(down_TF[:, :rope_dim], 1)
    q_THK = split(x_TD @ w["queries.query.weight"].T, heads)
    inner_TH, turned_TH = q_THK[:, :, rope_dim:], q_THK[:, :, :rope_dim]
    if turns:
        r_T1K, turned_TH = rope(r_T1K, rope_dim), rope(turned_TH, rope_dim)
    maps = w["memory.up.weight"].view(heads, 2, dim, -1)
    k_THK = torch.stack([c_TR @ maps[h, 0].T for h in range(heads)], 1)
    v_THK = torch.stack([c_TR @ maps[h, 1].T for h in range(heads)], 1)
    k_THK = torch.cat([k_THK, r_T1K.expand(-1, heads, -1)], -1)
    o_TF = attention(torch.cat([inner_TH, turned_TH], -1), k_THK, v_THK)
    return o_TF @ w["output.out.weight"].T


def test_latents_are_deepseeks() -> None:
    mixer = Attn(heads=3, head_dim=5, kv=Form("mla", (7, 4)))
    agree(mixer, lambda x, w: latent_attention(x, w, 3, 5, 4, turns=True))


def test_latents_without_position_keep_their_channels_unturned_as_kimi_linear_does() -> None:
    mixer = Attn(heads=2, head_dim=6, kv=Form("mla", (5, 3)), pos="none")
    agree(mixer, lambda x, w: latent_attention(x, w, 2, 6, 3, turns=False))


def test_a_step_over_latents_keeps_the_latent_alone() -> None:
    mixer = Attn(heads=3, head_dim=8, kv=Form("mla", (7, 4)))
    module, _ = built(mixer)
    _, state = by_steps(module, tokens())
    assert {name: tuple(kept.shape) for name, kept in state.items()} == {"latent": (1, 1, LENGTH, 11)}
    assert mixer.cost(WIDTH, 1000).state_bytes == 1000 * 11 * 4


def test_queries_of_low_rank_go_through_a_norm() -> None:
    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        low_TR = rms(x_TD @ w["queries.query.down.weight"].T, w["queries.query.norm.weight"])
        q_THK = split(low_TR @ w["queries.query.up.weight"].T, 4)
        k_THK = split(x_TD @ w["memory.key.weight"].T, 1)
        v_THK = split(x_TD @ w["memory.value.weight"].T, 1)
        return attention(rope(q_THK, 8), rope(k_THK, 8), v_THK) @ w["output.out.weight"].T

    agree(Attn(heads=4, head_dim=8, kv="mqa", query_rank=5), expected)


def test_heads_that_share_keys_have_values_of_their_own() -> None:
    """Shared-key attention (arXiv 2410.06577): softmax_s(q_h . k_s) v_hs, one k for all h, here in a window."""

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK = rope(split(x_TD @ w["queries.query.weight"].T, 4), 6)
        k_THK = rope(split(x_TD @ w["memory.key.weight"].T, 1), 6).expand(-1, 4, -1)
        v_THK = split(x_TD @ w["memory.value.weight"].T, 4)
        return attention(q_THK, k_THK, v_THK, sees=lambda t, s: 0 <= t - s < 7) @ w["output.out.weight"].T

    mixer = Attn(heads=4, kv="ska", window=7)
    agree(mixer, expected)
    # Five of eight entries.
    assert 8 * mixer.cost(WIDTH, 99).state_bytes == 5 * Attn(heads=4, window=7).cost(WIDTH, 99).state_bytes
    assert Attn(heads=1, kv="ska").canonical(WIDTH).kv == "mha"
    reason = Attn(heads=4, kv="ska", diff=Form("shared", (2,))).why_illegal(WIDTH)
    assert reason is not None
    assert "kv=ska has one head of keys, so it takes no diff=shared(2)" in reason


def test_reused_keys_give_the_values() -> None:
    """MFA-KR: V = (I + diag(a) N) K, keys being turned after that."""

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK = split(x_TD @ w["queries.query.weight"].T, 4)
        k_TK = x_TD @ w["memory.key.weight"].T
        reused = torch.eye(8, dtype=torch.float64) + torch.diag(w["memory.share"]) @ w["memory.mix.weight"]
        v_THK = split(k_TK @ reused.T, 1)
        return attention(rope(q_THK, 8), rope(split(k_TK, 1), 8), v_THK) @ w["output.out.weight"].T

    agree(Attn(heads=4, head_dim=8, kv="reuse"), expected)
    cost = Attn(heads=4, head_dim=8, kv="reuse").cost(WIDTH, 100)
    assert cost.state_bytes * 2 == Attn(heads=4, head_dim=8, kv="mqa").cost(WIDTH, 100).state_bytes


def test_shifted_keys_and_values_mix_in_those_of_the_token_before() -> None:
    """Lin et al., section 3.2: k_t = norm(a_t k'_{t-1} + (1 - a_t) k'_t), and values without the norm."""

    def shifted(new_THK: Tensor, share_TH: Tensor) -> Tensor:
        rows = []
        for t in range(len(new_THK)):
            before = new_THK[t - 1] if t > 0 else torch.zeros_like(new_THK[0])
            rows.append(share_TH[t, :, None] * before + (1 - share_TH[t, :, None]) * new_THK[t])
        return torch.stack(rows)

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = projected(x_TD, w, 4, 2)
        k_THK = shifted(k_THK, torch.sigmoid(x_TD @ w["memory.key_shift.share.weight"].T))
        v_THK = shifted(v_THK, torch.sigmoid(x_TD @ w["memory.value_shift.share.weight"].T))
        q_THK, k_THK = rms(q_THK, w["queries.query_norm.weight"]), rms(k_THK, w["memory.key_norm.weight"])
        return attention(q_THK, k_THK, v_THK) @ w["output.out.weight"].T

    agree(Attn(heads=4, kv=Form("gqa", (2,)), kv_shift="token", qk_norm="rms", pos="none"), expected)


def test_biases_stand_where_checkpoints_have_them() -> None:
    def expected(x_TD: Tensor, w: dict[str, Tensor], out: Tensor | float) -> Tensor:
        q, k, v = (
            x_TD @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            for name in ("queries.query", "memory.key", "memory.value")
        )
        o_TF = attention(rope(split(q, 3), 8), rope(split(k, 3), 8), split(v, 3))
        return o_TF @ w["output.out.weight"].T + out

    agree(Attn(heads=3, bias="qkv"), lambda x, w: expected(x, w, 0.0))
    agree(Attn(heads=3, bias="all"), lambda x, w: expected(x, w, w["output.out.bias"]))


def test_norms_of_queries_and_keys() -> None:
    def over_all_heads(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_TF = rms(x_TD @ w["queries.query.weight"].T, w["queries.query_norm.weight"])
        k_TF = rms(x_TD @ w["memory.key.weight"].T, w["memory.key_norm.weight"])
        v_TF = x_TD @ w["memory.value.weight"].T
        o_TF = attention(rope(split(q_TF, 4), 6), rope(split(k_TF, 2), 6), split(v_TF, 2))
        return o_TF @ w["output.out.weight"].T

    def cosine(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        """Liu et al., equation 2: cos(q, k) over a temperature of each head."""
        q_THK, k_THK, v_THK = projected(x_TD, w, 4, 4)
        q_THK, k_THK = q_THK / q_THK.norm(dim=-1, keepdim=True), k_THK / k_THK.norm(dim=-1, keepdim=True)
        gain = w["queries.query_norm.weight"]
        o_TF = attention(q_THK, k_THK, v_THK, score=lambda z, t, s, h: z * 6**0.5 * gain[h])
        return o_TF @ w["output.out.weight"].T

    agree(Attn(heads=4, kv=Form("gqa", (2,)), qk_norm="rms_all"), over_all_heads)
    agree(Attn(heads=4, qk_norm="l2", pos="none"), cosine)


def test_fewer_query_heads_cost_fewer_score_flops() -> None:
    """SQA: heads and head_dim say it. Half of the query heads halve what grows with the square of the length."""

    def squared(mixer: Attn) -> int:
        return mixer.cost(WIDTH, 200).flops - 2 * mixer.cost(WIDTH, 100).flops

    full, fewer = (
        Attn(heads=8, head_dim=4, kv=Form("gqa", (2,))),
        Attn(heads=4, head_dim=4, kv=Form("gqa", (2,))),
    )
    assert squared(full) == 2 * squared(fewer)
    assert full.cost(WIDTH, 100).state_bytes == fewer.cost(WIDTH, 100).state_bytes
