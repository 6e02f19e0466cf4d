"""Patterns by blocks: who sees whom as the papers define it, and a cache that holds just what is still seen."""

from __future__ import annotations

import pytest
import torch

from mixforge.kernels.attention import masked_attention_torch
from mixforge.search_space.parts.attention_pattern import Pattern
from mixforge.search_space.parts.attention_strides import Blocks, Boundaries, Strided

LENGTH = 41


def strided(t: int, s: int) -> bool:
    return s <= t and (t - s < 5 or (t - s) % 5 == 0)


def fixed(t: int, s: int) -> bool:
    return s <= t and (s // 5 == t // 5 or s % 5 in (3, 4))


def chunk(t: int, s: int) -> bool:
    return s <= t and s // 5 == t // 5


def checkpoints(t: int, s: int) -> bool:
    return s == t or (s < t // 5 * 5 and s % 5 == 4)


def leading(t: int, s: int) -> bool:
    return s <= t and (t - s < 3 or s % 5 == 4)


def overlapping(t: int, s: int) -> bool:
    return s <= t and (t - s < 11 or s % 4 == 3)


def in_pairs(t: int, s: int) -> bool:
    return s <= t and (t - s < 2 or s % 2 == 1)


PATTERNS = {
    strided: Strided(5, masked_attention_torch),
    fixed: Blocks(5, 2, masked_attention_torch),
    chunk: Blocks(5, 0, masked_attention_torch),
    checkpoints: Boundaries(5, 1, masked_attention_torch),
    leading: Boundaries(5, 3, masked_attention_torch),
    overlapping: Boundaries(4, 11, masked_attention_torch),
    in_pairs: Boundaries(2, 2, masked_attention_torch),
}
every_pattern = pytest.mark.parametrize(("rule", "pattern"), PATTERNS.items())


@every_pattern
def test_pairs_are_those_of_the_paper(rule, pattern: Pattern) -> None:
    position = torch.arange(LENGTH)
    seen = pattern.sees(position, position)
    assert seen.tolist() == [[rule(t, s) for s in range(LENGTH)] for t in range(LENGTH)]
    assert pattern.visible(position).tolist() == seen.sum(1).tolist()


@every_pattern
@pytest.mark.parametrize("capacity", [3, 5, 9, LENGTH])
@pytest.mark.parametrize("pieces", [(1,), (3,), (7, 2)])
def test_a_cache_holds_what_is_seen(rule, pattern: Pattern, capacity: int, pieces: tuple[int, ...]) -> None:
    cache = torch.full((1, 1, pattern.slots(capacity), 1), torch.nan)
    end, number = 0, 0
    while end < capacity:
        size = min(pieces[number % len(pieces)], capacity - end)
        number += 1
        new = torch.arange(end, end + size, dtype=torch.float32).reshape(1, 1, size, 1)
        met = pattern.extend(cache, new, end)
        assert met.flatten().tolist() == pattern.meets(end, size, new.device).tolist()
        for t in range(end, end + size):
            assert {s for s in range(t + 1) if rule(t, s)} <= set(met.flatten().tolist())
        end += size
        held = pattern.held(torch.tensor([end - 1]), cache.shape[2])
        kept = (held >= 0) & (held < end)
        assert torch.equal(cache.flatten()[kept], held[kept].float())
        assert {s for s in range(end) if rule(end - 1, s)} <= set(held.tolist())


@every_pattern
def test_single_tokens_go_where_they_are_looked_for(rule, pattern: Pattern) -> None:
    cache = torch.full((pattern.slots(LENGTH),), torch.nan)
    for t in range(LENGTH):
        cache[pattern.slot(torch.tensor([t]), len(cache))] = float(t)
        held = pattern.held(torch.tensor([t]), len(cache))
        kept = (held >= 0) & (held <= t)
        assert torch.equal(cache[kept], held[kept].float())
        assert {s for s in range(t + 1) if rule(t, s)} <= set(held.tolist())


@every_pattern
def test_attention_is_masked_attention(rule, pattern: Pattern) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, LENGTH, 8, dtype=torch.float64)
    position = torch.arange(LENGTH)
    found = pattern.attend(q, k[:, :2], v[:, :2], position, position)
    expected = masked_attention_torch(q, k[:, :2], v[:, :2], pattern.sees(position, position), 8**-0.5)
    torch.testing.assert_close(found, expected)
