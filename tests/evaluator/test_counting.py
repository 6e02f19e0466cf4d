"""Counters agree with one another and with the formulas."""

from __future__ import annotations

import pytest
import torch

from mixforge.evaluator.counting import count_flops, count_flops_by_trace, count_params
from mixforge.search_space.mixer import Backend
from mixforge.search_space.notation import parse


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ("lm(2 * (attn + mlp), width=32)", "torch"),
        ("lm(attn(kv=gqa(2), heads=4) + swiglu, width=32)", "torch"),
        ("lm(2 @ (attn + mlp) + geglu, width=32, embed=untied)", "torch"),
        ("lm(attn(window=8) + mlp, width=32)", "torch"),
    ],
)
def test_formula_and_both_counters_agree(text: str, backend: Backend) -> None:
    architecture = parse(text)
    model = architecture.build(backend)
    tokens_BT = torch.arange(21)[None]
    cost = architecture.cost(21)
    assert count_params(model) == cost.params
    assert count_flops(model, tokens_BT) == cost.flops
    assert count_flops_by_trace(model, tokens_BT) == cost.flops


def test_counters_agree_on_a_loop() -> None:
    model = parse("lm(retnet + mlp, width=32)").build("reference")
    tokens_BT = torch.arange(13)[None]
    assert count_flops(model, tokens_BT) == count_flops_by_trace(model, tokens_BT) > 0
