"""Keys and values of what a state space of each head makes of the input, as the Block-State Transformer lists it."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import agree, attention, split
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn

HEADS, NUMBERS, BLOCK = 3, 4, 6


def context(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
    """[T, H, D]: for each head h = exp(dt A) h + (exp(dt A) - 1) / A x for each channel, y = 2 Re C . h + b x."""
    width = x_TD.shape[1]
    a = torch.complex(-w["memory.scan.rate"].exp(), w["memory.scan.frequency"]).view(HEADS, width, -1)
    c = torch.view_as_complex(w["memory.scan.weight"].contiguous()).view(HEADS, width, -1)
    b_HD = w["memory.scan.skip"].view(HEADS, width)
    step = torch.exp(a * w["memory.scan.step_size"].exp().view(HEADS, width, 1))
    rows = []
    for h in range(HEADS):
        hidden = torch.zeros_like(step[h])
        said = []
        for x_D in x_TD:
            hidden = step[h] * hidden + (step[h] - 1) / a[h] * x_D[:, None]
            said.append(2 * (c[h] * hidden).sum(1).real + b_HD[h] * x_D)
        rows.append(torch.stack(said))
    return torch.stack(rows, 1)


def test_each_head_attends_to_states_of_its_own_filter() -> None:
    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        y_THD = context(x_TD, w)
        k_THK, v_THK = (
            torch.stack([y_THD[:, h] @ w[f"memory.{name}.weight"][h].T for h in range(HEADS)], 1)
            for name in ("key", "value")
        )
        q_THK = split(x_TD @ w["queries.query.weight"].T, HEADS)
        o_TF = attention(q_THK, k_THK, v_THK, sees=lambda t, s: t - t % BLOCK <= s <= t)
        return o_TF @ w["output.out.weight"].T

    kv, sparse = Form("filters", (NUMBERS,)), Form("chunk", (BLOCK,))
    agree(Attn(heads=HEADS, kv=kv, sparse=sparse, pos="none"), expected)


@pytest.mark.parametrize(
    ("genes", "given"),
    [
        ({"kv_shift": "token"}, "kv_shift=token"),
        ({"bias": "qkv"}, "bias=qkv"),
        ({"diff": Form("shared", (2,))}, "diff=shared(2)"),
        ({"score": Form("simplicial", (2, 2)), "pos": "none"}, "score=simplicial(2, 2)"),
        (
            {"score": Form("simplicial", (2, 2)), "pos": "none", "diff": "full"},
            "score=simplicial(2, 2)",
        ),
    ],
)
def test_filters_say_how_keys_are_made(genes: dict[str, str | Form], given: str) -> None:
    reason = Attn(heads=2, kv=Form("filters", (4,)), **genes).why_illegal(24)  # type: ignore[arg-type]
    assert reason is not None
    assert f"so it takes no {given} " in reason
    assert "conjugate pairs" in str(Attn(kv=Form("filters", (3,))).why_illegal(24))
