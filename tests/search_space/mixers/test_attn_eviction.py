"""Attention that evicts tokens, against learnable token eviction as a loop over tokens and those that each head keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import LENGTH, WIDTH, agree, at_once, attention, built, by_steps, rope, split, tokens
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.parts.layer import Pass

HEADS, WINDOW, BUDGET, SINKS = 2, 5, 3, 2
MIXER = Attn(heads=4, kv=Form("gqa", (HEADS,)), sparse=Form("lte", (WINDOW, BUDGET)))


def made(x_TD: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys that are not turned yet, values."""
    return (
        split(x_TD @ w["queries.query.weight"].T, 4),
        split(x_TD @ w["memory.key.weight"].T, HEADS),
        split(x_TD @ w["memory.value.weight"].T, HEADS),
    )


def scored(k_THK: Tensor, v_THV: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Three convolutions of three taps, whose output three tokens later is the token's: [T - 3, H]."""
    rows = []
    for h in range(HEADS):
        x_TK = torch.cat([k_THK[:, h], v_THV[:, h]], 1)
        for layer in range(3):
            weight_3KF = torch.unflatten(w[f"scores.weights.{layer}"][h], 0, (3, -1))
            zeros = torch.zeros(2, x_TK.shape[1], dtype=torch.float64)
            padded = torch.cat([zeros, x_TK])
            x_TK = torch.stack(
                [
                    sum((padded[t + i] @ weight_3KF[i] for i in range(3)), w[f"scores.biases.{layer}"][h, 0])
                    for t in range(len(x_TK))
                ]
            )
            x_TK = F.silu(x_TK)
        rows.append((x_TK @ w["scores.score"][h])[3:, 0])
    return torch.stack(rows, 1)


def kept(r_TH: Tensor, t: int, h: int, sinks: int) -> list[int]:
    """The best of the tokens that have left the window, the first tokens and the earlier of equal ones first; it."""
    left = sorted(range(max(0, t - WINDOW + 1)), key=lambda s: (s >= sinks, -r_TH[s, h].item(), s))
    return sorted(left[:BUDGET]) + list(range(max(0, t - WINDOW + 1), t + 1))


def evicting(
    q_THK: Tensor, k_THK: Tensor, v_THV: Tensor, r_TH: Tensor, w: dict[str, Tensor], sinks: int = 0
) -> Tensor:
    heads = []
    for head in range(4):
        h = head // 2
        sees = [set(kept(r_TH, t, h, sinks)) for t in range(len(q_THK))]
        one = slice(head, head + 1)
        heads.append(
            attention(
                rope(q_THK, 6)[:, one],
                rope(k_THK, 6)[:, h : h + 1],
                v_THV[:, h : h + 1],
                sees=lambda t, s, sees=sees: s in sees[t],
            )
        )
    return torch.cat(heads, 1) @ w["output.out.weight"].T


@pytest.mark.parametrize("sinks", [0, SINKS])
def test_each_head_keeps_the_best_of_the_tokens_that_left_its_window(sinks: int) -> None:
    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THV = made(x_TD, w)
        return evicting(q_THK, k_THK, v_THV, scored(k_THK, v_THV, w), w, sinks)

    agree(replace(MIXER, sink=Form("tokens", (sinks,)) if sinks else "none"), expected)


def test_the_earlier_of_equal_tokens_stays() -> None:
    """A text that repeats itself: a score comes back with its neighbours."""
    module, w = built(MIXER)
    x_TD = tokens(8).repeat(4, 1)
    with torch.no_grad():
        q_THK, k_THK, v_THV = made(x_TD, w)
        r_TH = scored(k_THK, v_THV, w)
        assert torch.equal(r_TH[8:16], r_TH[16:24])
        wanted = evicting(q_THK, k_THK, v_THV, r_TH, w)
    torch.testing.assert_close(at_once(module, x_TD), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_steps(module, x_TD)[0], wanted, rtol=1e-9, atol=1e-9)


def test_the_cache_does_not_grow() -> None:
    module, _ = built(MIXER)
    _, state = by_steps(module, tokens())
    assert state["key"].shape == (1, HEADS, WINDOW + BUDGET, 6)
    assert sorted(state["place"][0, 0, WINDOW:, 0].tolist()) != list(range(BUDGET))
    assert MIXER.cost(WIDTH, 100).state_bytes == MIXER.cost(WIDTH, 100_000).state_bytes


def test_scores_learn_as_if_they_had_multiplied_the_values() -> None:
    """The gradient of sigmoid(r) is that of the values times the values."""
    module, w = built(MIXER)
    x_TD = tokens()
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(LENGTH), 0))
    (found,) = torch.autograd.grad(y_BTD.square().sum(), [w["scores.score"]])

    q_THK, k_THK, v_THV = (each.detach() for each in made(x_TD, w))
    r_TH = scored(k_THK, v_THV, w)
    v_THV.requires_grad_()
    y_TD = evicting(q_THK, k_THK, v_THV, r_TH.detach(), w)
    (by_value,) = torch.autograd.grad(y_TD.square().sum(), [v_THV])
    by_gate_TH = (by_value * v_THV).sum(2)[: len(r_TH)]
    (expected,) = torch.autograd.grad((r_TH.sigmoid() * by_gate_TH.detach()).sum(), [w["scores.score"]])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
