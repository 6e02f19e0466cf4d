"""Attention with a learned query against the recurrence of its paper."""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracle import agree, built, by_steps, split, tokens
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn


@pytest.mark.parametrize("kv", ["mha", "mqa", Form("gqa", (2,))])
def test_a_learned_query_is_a_recurrence(kv: str | Form) -> None:
    """Feng et al., section 3.1: a_k, c_k and m_k, the sums of values and weights relative to the largest score."""
    mixer = Attn(heads=4, kv=kv, query="learned", pos="none")
    _, kv_heads, dim = mixer.sizes(24)

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        k_THK = split(x_TD @ w["memory.key.weight"].T, kv_heads)
        v_THK = split(x_TD @ w["memory.value.weight"].T, kv_heads)
        columns = []
        for h in range(4):
            g = h * kv_heads // 4
            a, c, m = torch.zeros(dim, dtype=torch.float64), 0.0, -math.inf
            rows = []
            for t in range(len(x_TD)):
                z = float(w["query"][h] @ k_THK[t, g]) / math.sqrt(dim)
                top = max(m, z)
                a = a * math.exp(m - top) + v_THK[t, g] * math.exp(z - top)
                c = c * math.exp(m - top) + math.exp(z - top)
                m = top
                rows.append(a / c)
            columns.append(torch.stack(rows))
        return torch.cat(columns, -1) @ w["output.out.weight"].T

    agree(mixer, expected)


def test_its_state_does_not_grow() -> None:
    mixer = Attn(heads=4, query="learned", pos="none")
    _, state = by_steps(built(mixer)[0], tokens())
    assert {name: tuple(kept.shape) for name, kept in state.items()} == {
        "top": (1, 4),
        "weight": (1, 4),
        "sum": (1, 4, 6),
    }
    assert mixer.cost(24, 10).state_bytes == mixer.cost(24, 10_000).state_bytes == 4 * (6 + 2) * 4


@pytest.mark.parametrize(
    ("genes", "words"),
    [
        ({}, "takes no pos=rope (mixer attn); leave pos at none"),
        ({"pos": "none", "window": 8}, "takes no window=8"),
        ({"pos": "none", "kv": "own"}, "use mha, mqa or gqa"),
        ({"pos": "none", "forget": "head"}, "takes no forget=head"),
    ],
)
def test_it_takes_nothing_that_needs_a_query_of_each_token(genes: dict[str, object], words: str) -> None:
    reason = Attn(query="learned", **genes).why_illegal(64)  # type: ignore[arg-type]
    assert reason is not None
    assert words in reason
