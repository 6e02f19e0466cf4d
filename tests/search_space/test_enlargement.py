"""Stacking, stretching and widening, against Composer's rules and by brute force."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import groupby

import pytest

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.enlargement import at_width, stack, stretch, widen
from mixforge.search_space.notation import parse

SIX = parse("lm(2 * attn + 4 * mlp, width=64)")
SIXTEEN = parse("lm(2 * attn + 5 * mlp + 2 * attn + 3 * mlp + attn + 3 * mlp, width=64)")


@pytest.mark.parametrize(
    ("small", "factor", "text"),
    [
        (SIX, 1, "2 * attn + 4 * mlp"),
        (SIX, 4, "4 * (2 * attn + 4 * mlp)"),
        # 32 of 6: five copies, and the small stack stretched by 2 / 6, every run rounded up.
        (SIX, Fraction(32, 6), "5 * (2 * attn + 4 * mlp) + attn + 2 * mlp"),
        (SIX, 2.5, "2 * (2 * attn + 4 * mlp) + attn + 2 * mlp"),
    ],
)
def test_stack_copies_and_ends_with_a_stretched_rest(
    small: Architecture, factor: float | Fraction, text: str
) -> None:
    assert stack(small, factor) == parse(f"lm({text}, width=64)")


def test_stretch_makes_every_run_longer() -> None:
    doubled = stretch(SIXTEEN, 2)
    assert doubled == parse("lm(4 * attn + 10 * mlp + 4 * attn + 6 * mlp + 2 * attn + 6 * mlp, width=64)")
    for factor in (1, 1.1, 1.5, Fraction(27, 16), 3):
        runs = [len(list(run)) for _, run in groupby(SIXTEEN.stack)]
        grown = [len(list(run)) for _, run in groupby(stretch(SIXTEEN, factor).stack)]
        assert grown == [math.ceil(Fraction(str(factor)) * run) for run in runs]
    assert stretch(SIXTEEN, 1.1).stack == stretch(SIXTEEN, Fraction(11, 10)).stack


def test_every_copy_of_a_shared_cache_has_its_owner() -> None:
    yoco = parse("lm(attn(window=32) + attn(kv=own) + 2 * attn(kv=shared), width=64)")
    assert stack(yoco, 3).illegality() is None
    assert stretch(yoco, 3).illegality() is None


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf"), 5_000])
def test_a_factor_that_is_none_is_refused(factor: float) -> None:
    for scale in (stack, stretch):
        with pytest.raises(ValueError, match="factor"):
            scale(SIX, factor)
    with pytest.raises(ValueError, match="is below 1"):
        stack(SIX, 0.5)
    with pytest.raises(ValueError, match="at most 1024"):
        stack(SIX, 500)


@pytest.mark.parametrize(
    ("text", "width", "grow", "wide"),
    [
        ("attn + swiglu", 128, "heads", "attn + swiglu"),
        ("attn(heads=4)", 128, "heads", "attn(heads=8)"),
        ("attn(heads=4)", 128, "head_dim", "attn(heads=4)"),
        ("attn", 256, "head_dim", "attn(heads=2)"),
        ("attn(heads=4, head_dim=32)", 128, "heads", "attn(heads=8, head_dim=32)"),
        ("attn(heads=4, head_dim=32)", 128, "head_dim", "attn(heads=4, head_dim=64)"),
        ("attn(heads=4, kv=gqa(2))", 128, "heads", "attn(heads=8, kv=gqa(4))"),
        ("gdn(heads=4, key_dim=8)", 96, "heads", "gdn(heads=6, key_dim=8)"),
        ("gdn(heads=4, key_dim=8)", 96, "head_dim", "gdn(heads=4, key_dim=12)"),
        ("attn(heads=4, kv=mqa)", 128, "heads", "attn(heads=8, kv=mqa)"),
        ("gdn(heads=4, key_heads=1)", 128, "heads", "gdn(heads=8, key_heads=1)"),
        ("gdn(heads=4, key_heads=1)", 128, "head_dim", "gdn(heads=4, key_heads=1)"),
        ("linear(heads=1, key_dim=8)", 192, "heads", "linear(heads=1, key_dim=8)"),
        ("attn(heads=1)", 192, "heads", "attn(heads=1)"),
        ("(attn(heads=4) | 3 * gdn(heads=4))", 128, "heads", "(attn(heads=8) | 3 * gdn(heads=8))"),
        ("beside(attn(heads=4), conv, fuse=mean)", 128, "heads", "beside(attn(heads=8), conv, fuse=mean)"),
        ("2 @ (attn(heads=4) + mlp)", 128, "heads", "2 @ (attn(heads=8) + mlp)"),
        ("residual(attn(heads=4) + mlp)", 128, "heads", "residual(attn(heads=8) + mlp)"),
    ],
)
def test_at_width_keeps_proportions(text: str, width: int, grow: str, wide: str) -> None:
    found = at_width(parse(f"lm({text}, width=64)"), width, grow)  # type: ignore[arg-type]
    assert found == parse(f"lm({wide}, width={width})")


def test_a_width_without_whole_heads_is_none() -> None:
    assert at_width(parse("lm(attn(heads=4), width=64)"), 72, "heads") is None


@pytest.mark.parametrize("grow", ["heads", "head_dim"])
@pytest.mark.parametrize("params", [2e5, 1e6])
def test_widen_finds_the_largest_legal_width(grow: str, params: float) -> None:
    small = parse("lm(2 * (gdn + swiglu) + attn(heads=4, kv=gqa(2)) + swiglu, width=64)")
    found = widen(small, params=params, grow=grow)  # type: ignore[arg-type]
    best = 0
    for width in range(16, 1_024, 16):
        other = at_width(small, width, grow)  # type: ignore[arg-type]
        if other is not None and other.illegality() is None and other.cost(1).params <= params:
            best = width
    assert found.illegality() is None
    assert found.width == best
    assert found.depth == small.depth


def test_widen_to_a_predicted_latency() -> None:
    small = parse("lm(2 * (attn + mlp), width=64)")
    found = widen(small, fits=lambda each: each.cost(512).flops / 1e9 <= 1.0, widest=2_048)
    assert found.cost(512).flops <= 1e9
    wider = at_width(small, found.width + 16)
    assert wider is not None
    assert wider.cost(512).flops > 1e9
    both = widen(small, params=3e5, fits=lambda each: each.width <= 4_000)
    assert both == widen(small, params=3e5)


def test_widen_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="needs a budget"):
        widen(SIX)
    with pytest.raises(ValueError, match="the narrowest, 16, is outside of the budget"):
        widen(SIX, params=10)
    with pytest.raises(ValueError, match="'depth' is not one of heads, head_dim"):
        widen(SIX, params=1e6, grow="depth")  # type: ignore[arg-type]
