"""Scores, weights and outputs of attention against the papers that change them."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import LENGTH, agree, attention, projected, rms, rope, split
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.parts.layer import Pass


def out(o_TF: Tensor, w: dict[str, Tensor]) -> Tensor:
    return o_TF @ w["output.out.weight"].T


def turned(x_TD: Tensor, w: dict[str, Tensor], heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q_THK, k_THK, v_THK = projected(x_TD, w, heads, kv_heads)
    return rope(q_THK, q_THK.shape[-1]), rope(k_THK, k_THK.shape[-1]), v_THK


@pytest.mark.parametrize("window", ["none", 6])
def test_forget_gates_are_added_as_the_logarithms_of_what_is_left(window: str | int) -> None:
    """Lin et al., equation 3: o_t = sum F_ts exp(q k) v / sum F_ts exp(q k), F_ts the product of f_l over s < l <= t."""

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = projected(x_TD, w, 4, 2)
        f_TH = torch.sigmoid(x_TD @ w["forget.gate.weight"].T + w["forget.gate.bias"])
        span = LENGTH if isinstance(window, str) else window
        rows = []
        for t in range(len(x_TD)):
            seen = list(range(max(0, t - span + 1), t + 1))
            for h in range(4):
                left = torch.stack([f_TH[s + 1 : t + 1, h].prod() for s in seen])
                weight = left * (k_THK[seen, h // 2] @ q_THK[t, h] / math.sqrt(6)).exp()
                rows.append(weight @ v_THK[seen, h // 2] / weight.sum())
        return out(torch.stack(rows).view(len(x_TD), -1), w)

    agree(Attn(heads=4, kv=Form("gqa", (2,)), forget="head", pos="none", window=window), expected)


@pytest.mark.parametrize("window", ["none", 6])
def test_a_mask_of_decays_multiplies_the_weights(window: str | int) -> None:
    """Zhao et al., along one path: (softmax(q k) L) v, L_ts the product of f_l over s < l <= t."""

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = turned(x_TD, w, 4, 2)
        f_TH = torch.sigmoid(x_TD @ w["forget.gate.weight"].T + w["forget.gate.bias"])
        span = LENGTH if isinstance(window, str) else window
        rows = []
        for t in range(len(x_TD)):
            seen = list(range(max(0, t - span + 1), t + 1))
            for h in range(4):
                left = torch.stack([f_TH[s + 1 : t + 1, h].prod() for s in seen])
                weight = (k_THK[seen, h // 2] @ q_THK[t, h] / math.sqrt(6)).softmax(0)
                rows.append((weight * left) @ v_THK[seen, h // 2])
        return out(torch.stack(rows).view(len(x_TD), -1), w)

    agree(Attn(heads=4, kv=Form("gqa", (2,)), forget="mask", window=window), expected)


def test_a_pro_block_norms_and_gates_what_its_heads_say() -> None:
    """Lin et al., section 3.2, with shifted keys and values as `test_attn_memory` has them."""
    mixer = Attn(heads=4, **Attn.aliases["fox_pro"])  # type: ignore[arg-type]

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        def shifted(name: str, new_THK: Tensor) -> Tensor:
            share_TH1 = torch.sigmoid(x_TD @ w[f"memory.{name}_shift.share.weight"].T)[..., None]
            before_THK = torch.cat([torch.zeros_like(new_THK[:1]), new_THK[:-1]])
            return share_TH1 * before_THK + (1 - share_TH1) * new_THK

        q_THK, k_THK, v_THK = projected(x_TD, w, 4, 4)
        q_THK = rms(q_THK, w["queries.query_norm.weight"])
        k_THK = rms(shifted("key", k_THK), w["memory.key_norm.weight"])
        sums_TH = F.logsigmoid(x_TD @ w["forget.gate.weight"].T + w["forget.gate.bias"]).cumsum(0)
        o_TF = attention(
            q_THK, k_THK, shifted("value", v_THK), lambda z, t, s, h: z + sums_TH[t, h] - sums_TH[s, h]
        )
        o_TF = rms(split(o_TF, 4), w["output.norm.weight"]).flatten(1)
        return out(o_TF * torch.sigmoid(x_TD @ w["output.gate.weight"].T), w)

    agree(mixer, expected)


@pytest.mark.parametrize("genes", [{}, {"headmix": "static"}])
def test_a_sink_is_one_more_logit_in_the_denominator(genes: dict[str, str]) -> None:
    """As in the reference code of GPT-OSS; in both forms of the scores."""
    name = "scores.weigh.sink" if genes else "scores.sink"

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = turned(x_TD, w, 4, 4)
        mix = w["scores.mix.weight"] if genes else torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
        rows = []
        for t in range(len(x_TD)):
            z_HS = torch.stack([k_THK[: t + 1, h] @ q_THK[t, h] / math.sqrt(6) for h in range(4)])
            weight_HS = torch.stack(
                [z.exp() / (z.exp().sum() + w[name][h].exp()) for h, z in enumerate(mix[0].T @ z_HS)]
            )
            rows.append(torch.cat([(mix[1].T @ weight_HS)[h] @ v_THK[: t + 1, h] for h in range(4)]))
        return out(torch.stack(rows), w)

    agree(Attn(heads=4, sink="learned", **genes), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("score", ["sigmoid", "relu", "relu2", "normalise"])
def test_other_weights_than_softmax(score: str) -> None:
    def weigh(z_S: Tensor, h: int) -> Tensor:
        if score == "sigmoid":
            return 1 / (1 + torch.exp(-z_S))
        if score == "normalise":
            return (z_S - z_S.mean()) / torch.sqrt(z_S.var(correction=0) + 1e-6) / len(z_S)
        return z_S.clamp(min=0) ** {"relu": 1, "relu2": 2}[score] / len(z_S)

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        return out(attention(*turned(x_TD, w, 4, 2), weigh=weigh, sees=lambda t, s: t - 9 < s <= t), w)

    agree(Attn(heads=4, kv=Form("gqa", (2,)), score=score, window=9), expected)


def test_ssmax_raises_the_number_of_keys_to_the_scores() -> None:
    """Nakanishi, equation 2: n^(s z) over its sum."""

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        def weigh(z_S: Tensor, h: int) -> Tensor:
            power = len(z_S) ** (w["queries.temper.weight"][h] * z_S)
            return power / power.sum()

        return out(attention(*turned(x_TD, w, 2, 2), weigh=weigh), w)

    agree(Attn(heads=2, temper="ssmax"), expected)


def differential(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, w: dict[str, Tensor], start: float) -> Tensor:
    """Ye et al., equations 1 to 3: (softmax_1 - lambda softmax_2) V, normalised, for pairs of heads."""
    heads, kv_heads = q_THK.shape[1], k_THK.shape[1]
    (a_1, a_2), (b_1, b_2) = w["output.difference.weight"]
    strength = torch.exp(a_1 @ b_1) - torch.exp(a_2 @ b_2) + start
    rows = []
    for t in range(len(q_THK)):
        for h in range(heads // 2):
            first, second = h * kv_heads // heads, (h + heads // 2) * kv_heads // heads
            maps = [
                (k_THK[: t + 1, g] @ q_THK[t, i] / math.sqrt(q_THK.shape[2])).softmax(0)
                for i, g in ((h, first), (h + heads // 2, second))
            ]
            v_TV = torch.cat([v_THK[: t + 1, first], v_THK[: t + 1, second]], -1)
            o_V = (maps[0] - strength * maps[1]) @ v_TV
            rows.append((1 - start) * rms(o_V, w["output.difference.norm.weight"]))
    return out(torch.stack(rows).view(len(q_THK), -1), w)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_differential_attention_subtracts_a_second_map(kv_heads: int) -> None:
    mixer = Attn(heads=4, kv=Form("gqa", (kv_heads,)), diff="full", lambda_init=0.4)
    agree(mixer, lambda x, w: differential(*turned(x, w, 4, kv_heads), w, 0.4))


def test_differential_maps_of_one_base_and_two_updates() -> None:
    """Cang et al.: Q_m = X (W + A_m B_m), and keys alike."""

    def both(x_TD: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
        down, up = w[f"{name}.down.weight"], w[f"{name}.up"]
        maps = [x_TD @ (w[f"{name}.base.weight"].T + down[3 * m : 3 * m + 3].T @ up[m]) for m in (0, 1)]
        return split(torch.cat(maps, -1), 4)

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK = both(x_TD, w, "queries.query"), both(x_TD, w, "memory.key")
        v_THK = split(x_TD @ w["memory.value.weight"].T, 4)
        return differential(rope(q_THK, 6), rope(k_THK, 6), v_THK, w, 0.2)

    agree(Attn(heads=4, diff=Form("shared", (3,))), expected)


def test_the_first_strength_of_a_difference_grows_with_the_layer() -> None:
    """Ye et al., section 2.1: 0.8 - 0.6 exp(-0.3 (l - 1)), l being counted from 1."""
    starts = [Attn(diff="full").placed(layer, 3).lambda_init for layer in range(3)]
    assert starts == [pytest.approx(0.8 - 0.6 * math.exp(-0.3 * layer)) for layer in range(3)]
    assert Attn(diff="full", lambda_init=0.5).placed(2, 3).lambda_init == 0.5
    assert Attn().placed(2, 3) == Attn()


def test_heads_that_mix_are_composed_of_both_tokens_of_a_pair() -> None:
    """Xiao et al., section 2: A (I + a_t^T b_t + c_s^T d_s + diag(e_t) + diag(f_s)), before softmax and after it."""
    heads, rank = 4, 2

    def maps(x_TD: Tensor, w: dict[str, Tensor], kind: int) -> list[Tensor]:
        """[H, H] for each token."""
        hidden = 2 * heads * rank
        rows = slice(kind * hidden, (kind + 1) * hidden)
        inner = F.gelu(x_TD @ w["scores.mix.down.weight"][rows].T) @ w["scores.mix.up"][kind]
        both = inner.view(len(x_TD), 2, rank, heads)
        gate = torch.tanh(x_TD @ w["scores.mix.gate.weight"][kind * heads : (kind + 1) * heads].T)
        return [
            rms(first, torch.ones(heads, dtype=torch.float64)).T @ second + torch.diag(gate[t])
            for t, (first, second) in enumerate(both)
        ]

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = turned(x_TD, w, heads, heads)
        query_0, key_0, query_1, key_1 = (maps(x_TD, w, kind) for kind in range(4))
        eye = torch.eye(heads, dtype=torch.float64)
        rows = []
        for t in range(len(x_TD)):
            z_SH = torch.stack(
                [
                    (q_THK[t] * k_THK[s]).sum(-1) / math.sqrt(6) @ (eye + query_0[t] + key_0[s])
                    for s in range(t + 1)
                ]
            )
            weight_SH = z_SH.softmax(0)
            weight_SH = torch.stack([weight_SH[s] @ (eye + query_1[t] + key_1[s]) for s in range(t + 1)])
            rows.append(torch.cat([weight_SH[:, h] @ v_THK[: t + 1, h] for h in range(heads)]))
        return out(torch.stack(rows), w)

    agree(Attn(heads=heads, headmix=Form("dynamic", (rank,))), expected)


@pytest.mark.parametrize(
    "genes",
    [
        {"forget": "head"},
        {"pos": "alibi", "window": 7},
        {"forget": "head", "pos": "alibi_rope", "sink": "learned", "kv": "mqa"},
    ],
)
def test_on_a_gpu_terms_are_added_where_scores_are_made(
    genes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence without a past through FlexAttention, which a CPU runs as plain torch."""
    kernels = importlib.import_module("mixforge.kernels.attention_triton")
    monkeypatch.setattr(kernels, "check_gpu", lambda *given: None)
    monkeypatch.setattr(kernels, "check_dtype", lambda *given: None)
    eager = torch.compile(kernels.biased, fullgraph=True, backend="eager")
    monkeypatch.setattr(kernels, "compiled_biased", eager)
    whole = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(whole, "_validate_device", lambda *given: None)
    x = torch.randn(2, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        module = Attn(heads=4, **genes).build(32, backend).build().double()
        if backend == "triton":
            monkeypatch.setattr(module.scores, "every_pair", None)
        loss = module(x, None, Pass(torch.arange(20), 0))[0].sin().sum()
        found.append([loss, *torch.autograd.grad(loss, list(module.parameters()))])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
