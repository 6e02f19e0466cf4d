"""Who sees whom: windows, dilated and drawn ones, first tokens, meta tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from attention_oracle import LENGTH, agree, at_once, attention, built, by_steps, projected, rope, tokens
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.parts.layer import Pass


def windowed(x_TD: Tensor, w: dict[str, Tensor], window: int, dilation: int, first: int) -> Tensor:
    """Beltagy et al., section 3.1; Xiao et al., section 3.2, with the tokens' own positions."""

    def sees(t: int, s: int) -> bool:
        return s <= t and (s < first or s in range(t, t - window * dilation, -dilation))

    q_THK, k_THK, v_THK = projected(x_TD, w, 2, 2)
    return attention(rope(q_THK, 12), rope(k_THK, 12), v_THK, sees=sees) @ w["output.out.weight"].T


@pytest.mark.parametrize(
    ("window", "dilation", "first"), [(3, 2, 0), (5, 3, 0), (2, 7, 0), (4, 1, 2), (3, 2, 3), (30, 1, 1)]
)
def test_windows_are_their_definition(window: int, dilation: int, first: int) -> None:
    sink = Form("tokens", (first,)) if first else "none"
    mixer = Attn(heads=2, window=window, dilation=dilation, sink=sink)
    agree(mixer, lambda x, w: windowed(x, w, window, dilation, first))


@pytest.mark.parametrize("genes", [{"dilation": 2}, {"sink": Form("tokens", (3,))}])
def test_a_window_counts_the_keys_that_it_shows(genes: dict[str, object]) -> None:
    pattern = Attn(heads=2, window=4, **genes).build(24, "torch").build().pattern  # type: ignore[arg-type]
    position = torch.arange(20)
    assert torch.equal(pattern.visible(position), pattern.sees(position, position).sum(1))


def test_a_window_with_first_tokens_keeps_no_more_than_both() -> None:
    mixer = Attn(heads=2, window=4, sink=Form("tokens", (3,)))
    assert mixer.cost(24, 1000).state_bytes == (4 + 3) * 2 * 24 * 4
    assert Attn(heads=2, window=4, dilation=5).cost(24, 1000).state_bytes == (3 * 5 + 1) * 2 * 24 * 4


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_tokens_of_a_prefix_see_one_another_and_later_ones_no_later_one(kv_heads: int) -> None:
    """Raffel et al., section 3.2.1: pairs are seen where s <= t, or s is in the prefix."""
    module, w = built(Attn(heads=4, kv=Form("gqa", (kv_heads,)), mask=Form("prefix", (9,))))
    x_TD = tokens()
    q_THK, k_THK, v_THK = projected(x_TD, w, 4, kv_heads)

    def expected(prefix: int) -> Tensor:
        given = (rope(q_THK, 6), rope(k_THK, 6), v_THK)
        return attention(*given, sees=lambda t, s: s <= t or s < prefix) @ w["output.out.weight"].T

    torch.testing.assert_close(at_once(module, x_TD), expected(9))
    # The prefix is of the first pass alone: what comes after it, however short it was, sees no later token.
    for cuts in ((0, 9, LENGTH), (0, 12, 20, LENGTH), (0, 4, LENGTH), (0, 4, 6, LENGTH)):
        state = module.initial_state(1, LENGTH, x_TD.device, x_TD.dtype)
        pieces = [
            module(x_TD[None, start:end], state, Pass(torch.arange(start, end), start))[0][0]
            for start, end in pairwise(cuts)
        ]
        torch.testing.assert_close(torch.cat(pieces), expected(min(9, cuts[1])))
    torch.testing.assert_close(by_steps(module, x_TD)[0], expected(0))


@torch.no_grad()
def test_a_prefix_has_relative_positions_of_both_signs_and_counts_its_keys() -> None:
    module, w = built(Attn(heads=3, mask=Form("prefix", (9,)), pos=Form("relative", (4,)), temper="ssmax"))
    x_TD = tokens()
    q_THK, k_THK, v_THK = projected(x_TD, w, 3, 3)
    keys, values = w["scores.relative.key"], w["scores.relative.value"]
    assert len(keys) == len(values) == 9
    rows = []
    for t in range(LENGTH):
        seen = list(range(max(t + 1, 9)))
        distance = [max(-4, min(t - s, 4)) + 4 for s in seen]
        for h in range(3):
            query = q_THK[t, h] * w["queries.temper.weight"][h] * math.log(len(seen))
            z = (k_THK[seen, h] + keys[distance]) @ query / math.sqrt(8)
            rows.append(z.softmax(0) @ (v_THK[seen, h] + values[distance]))
    expected = torch.stack(rows).view(LENGTH, -1) @ w["output.out.weight"].T
    torch.testing.assert_close(at_once(module, x_TD), expected)


@torch.no_grad()
def test_training_draws_one_of_two_windows_for_a_whole_batch_and_evaluation_takes_the_longer() -> None:
    """Cabannes et al.: a batch takes the short or the long window, each half of the time."""
    module, w = built(Attn(heads=2, window=Form("stochastic", (2, 6))))
    x_TD = tokens()
    short, long = (windowed(x_TD, w, window, 1, 0) for window in (2, 6))
    torch.testing.assert_close(at_once(module, x_TD), long)
    torch.testing.assert_close(by_steps(module, x_TD)[0], long)
    module.train()
    torch.manual_seed(0)
    counts = [0, 0]
    for _ in range(64):
        at = Pass(torch.arange(LENGTH), 0)
        y_TD = module(x_TD[None], None, at)[0][0]
        is_short = torch.allclose(y_TD, short)
        assert is_short or torch.allclose(y_TD, long)
        counts[is_short] += 1
        # Another layer of the same pass takes the same window.
        assert torch.equal(module(x_TD[None], None, at)[0][0], y_TD)
    assert min(counts) > 16
    state = module.initial_state(1, LENGTH, x_TD.device, x_TD.dtype)
    torch.testing.assert_close(module(x_TD[None], state, Pass(torch.arange(LENGTH), 0))[0][0], long)


def test_two_windows_of_one_size_are_one() -> None:
    assert Attn(window=Form("stochastic", (64, 64))).canonical(128) == Attn(window=64)
    reason = Attn(window=Form("stochastic", (64, 32))).why_illegal(128)
    assert reason is not None
    assert "shorter one first" in reason


@pytest.mark.parametrize(
    "genes", [{}, {"window": 4}, {"forget": "head", "pos": "none"}, {"score": "sigmoid"}]
)
def test_meta_tokens_are_keys_and_values_that_every_token_sees(genes: dict[str, object]) -> None:
    """Their keys stand before the sequence, have no position and are not forgotten."""
    mixer = Attn(heads=2, meta=3, **genes)  # type: ignore[arg-type]
    module, w = built(mixer)
    x_TD = tokens()
    with torch.no_grad():
        q_THK, k_THK, v_THK = projected(x_TD, w, 2, 2)
        if mixer.pos == "rope":
            q_THK, k_THK = rope(q_THK, 12), rope(k_THK, 12)
        gate_TH = (
            torch.nn.functional.logsigmoid(x_TD @ w["forget.gate.weight"].T + w["forget.gate.bias"])
            if mixer.forget == "head"
            else torch.zeros(LENGTH, 2, dtype=torch.float64)
        )
        window = mixer.window if isinstance(mixer.window, int) else LENGTH
        rows = []
        for t in range(LENGTH):
            near = range(max(0, t - window + 1), t + 1)
            for h in range(2):
                keys = torch.cat([w["learned.key"][h], k_THK[list(near), h]])
                values = torch.cat([w["learned.value"][h], v_THK[list(near), h]])
                gone = torch.stack([gate_TH[s + 1 : t + 1, h].sum() for s in near])
                z = keys @ q_THK[t, h] / 12**0.5 + torch.cat([torch.zeros(3, dtype=torch.float64), gone])
                weights = torch.sigmoid(z) if mixer.score == "sigmoid" else z.softmax(0)
                rows.append(weights @ values)
        expected = torch.stack(rows).view(LENGTH, -1) @ w["output.out.weight"].T
    torch.testing.assert_close(at_once(module, x_TD), expected)
    torch.testing.assert_close(by_steps(module, x_TD)[0], expected)


@pytest.mark.parametrize(
    "genes",
    [
        {"sink": "learned"},
        {"forget": "head", "pos": "none", "meta": 2},
        {"score": "sigmoid", "pos": "alibi_rope", "meta": 1},
        {"headmix": Form("dynamic", (2,))},
        {"pos": Form("relative", (3,)), "dilation": 2},
    ],
)
@torch.no_grad()
def test_a_window_costs_blocks_and_not_all_pairs(genes: dict[str, object]) -> None:
    """From 4 windows on, with the same result as all pairs, which prefill over a past still computes."""
    mixer = Attn(heads=2, window=4, **genes)  # type: ignore[arg-type]
    module, _ = built(mixer)
    x_TD = tokens(61)
    whole = at_once(module, x_TD)
    state = module.initial_state(1, 61, x_TD.device, x_TD.dtype)
    pieces = [
        module(x_TD[None, start:end], state, Pass(torch.arange(start, end), start))[0][0]
        for start, end in ((0, 7), (7, 61))
    ]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-9, atol=1e-9)
    growth = mixer.cost(24, 2000).flops - mixer.cost(24, 1000).flops
    assert growth == pytest.approx(mixer.cost(24, 1000).flops, rel=0.02)
