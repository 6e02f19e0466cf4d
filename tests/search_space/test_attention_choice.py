"""Blocks that a query chooses, and attention in two levels, against the papers' definitions as float64 loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixforge.kernels.attention import masked_attention_torch
from mixforge.search_space.parts.attention_blocks import Sight
from mixforge.search_space.parts.attention_choice import BestBlocks, ChosenBlocks, LikelyBlocks
from mixforge.search_space.parts.attention_grouped import Grouped

BLOCK, LENGTH, DIM = 4, 23, 6


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 4, LENGTH, DIM, generator=generator, dtype=torch.float64)
    return q, k[:, :2], v[:, :2]


def best(scores: list[float]) -> set[int]:
    """MoBA with k = 3: the own block and the two best."""
    return set(sorted(range(len(scores)), key=lambda j: -scores[j])[:2])


def likely(scores: list[float]) -> set[int]:
    """NABLA at a share of 0.7."""
    weights = [math.exp(score / math.sqrt(DIM)) for score in scores]
    chosen: set[int] = set()
    held = 0.0
    for j in sorted(range(len(scores)), key=lambda j: -weights[j]):
        if held / sum(weights) < 0.7:
            chosen.add(j)
            held += weights[j]
    return chosen


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        (best, BestBlocks(BLOCK, 2, masked_attention_torch)),
        (likely, LikelyBlocks(BLOCK, 0.7, masked_attention_torch)),
    ],
)
def test_queries_choose_the_blocks_of_the_paper(rule, pattern: ChosenBlocks) -> None:
    q, k, v = drawn(3)
    position = torch.arange(LENGTH)
    seen = pattern.choose(q, k, position, position)
    for h in range(4):
        for t in range(LENGTH):
            means = [k[0, h // 2, j * BLOCK : (j + 1) * BLOCK].mean(0) for j in range(t // BLOCK)]
            blocks = {t // BLOCK, *rule([float(q[0, h, t] @ mean) for mean in means])}
            assert seen[0, h, t].tolist() == [s <= t and s // BLOCK in blocks for s in range(LENGTH)]
    expected = masked_attention_torch(q, k, v, seen, DIM**-0.5)
    torch.testing.assert_close(pattern.attend(q, k, v, position, position), expected)
    # One query over a cache with room for more chooses the same.
    room = torch.cat([k, torch.zeros(1, 2, 5, DIM, dtype=k.dtype)], 2)
    last = pattern.choose(q[:, :, -1:], room, position[-1:], torch.arange(LENGTH + 5))
    assert torch.equal(last[..., :LENGTH], seen[:, :, -1:])


def two_levels(q: Tensor, k: Tensor, v: Tensor, count: int, own: bool) -> Tensor:
    """o_t of one head as its equations stand, over all earlier blocks."""
    outputs = []
    for t in range(LENGTH):
        first = t // BLOCK * BLOCK
        blocks = [range(j * BLOCK, (j + 1) * BLOCK) for j in range(t // BLOCK)]
        marks = [k[s[-1]] if own else k[list(s)].mean(0) for s in blocks]
        level = {j: float(q[t] @ mark) / math.sqrt(DIM) for j, mark in enumerate(marks)}
        level = {j: level[j] for j in sorted(level, key=lambda j: -level[j])[:count]}
        near = {s: float(q[t] @ k[s]) / math.sqrt(DIM) for s in range(first, t + 1)} if own else {}
        total = sum(map(math.exp, [*level.values(), *near.values()]))
        o = torch.zeros(DIM, dtype=torch.float64)
        for s, score in near.items():
            o += math.exp(score) / total * v[s]
        for j, score in level.items():
            inner = {s: math.exp(float(q[t] @ k[s]) / math.sqrt(DIM)) for s in blocks[j]}
            for s, raised in inner.items():
                o += math.exp(score) / total * raised / sum(inner.values()) * v[s]
        outputs.append(o)
    return torch.stack(outputs)


@pytest.mark.parametrize("own", [True, False], ids=["landmark", "hsa"])
def test_two_levels_are_those_of_the_paper(own: bool) -> None:
    q, k, v = drawn(4)
    position = torch.arange(LENGTH)
    scores = Grouped(BLOCK, 2, own, DIM**-0.5)
    pattern = BestBlocks(BLOCK, 2, masked_attention_torch)
    found = scores(q, k, v, Sight(position, position, pattern, {}, {}, None, 0, q))
    expected = torch.stack([two_levels(q[0, h], k[0, h // 2], v[0, h // 2], 2, own) for h in range(4)])[None]
    torch.testing.assert_close(found, expected)
    room = [torch.cat([x, torch.zeros(1, 2, 6, DIM, dtype=x.dtype)], 2) for x in (k, v)]
    sight = Sight(position[-1:], torch.arange(LENGTH + 6), pattern, {}, {}, None, 0, q)
    torch.testing.assert_close(scores.step(q[:, :, -1:], *room, sight), expected[:, :, -1:])
    assert torch.isfinite(found).all()
