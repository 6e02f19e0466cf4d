"""Summaries of blocks, and native sparse attention, against their papers' equations as float64 loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixforge.kernels.attention import masked_attention_torch
from mixforge.search_space.parts.attention_blocks import Sight
from mixforge.search_space.parts.attention_strides import Strided
from mixforge.search_space.parts.attention_summaries import NativeSparse, Summarised

BLOCK, LENGTH, DIM, WIDTH = 4, 23, 6, 10
POSITION = torch.arange(LENGTH)
# Who sees whom is for the scores to say: the pattern only keeps every token.
KEEPS_ALL = Strided(1, masked_attention_torch)


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of four heads, keys and values of two, inputs."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 1, 4, LENGTH, DIM, generator=generator, dtype=torch.float64)
    return q, k[:, :2], v[:, :2], torch.randn(1, LENGTH, WIDTH, generator=generator, dtype=torch.float64)


def attention(q: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[float]]:
    """Softmax attention of one query over keys and values, and its weights."""
    raised = [math.exp(float(q @ key) / math.sqrt(DIM)) for key, _ in pairs]
    weights = [each / sum(raised) for each in raised]
    o = torch.zeros(DIM, dtype=torch.float64)
    for weight, (_, value) in zip(weights, pairs, strict=True):
        o += weight * value
    return o, weights


def means(x: Tensor, t: int) -> list[Tensor]:
    """Of the blocks before that of token t."""
    return [x[j * BLOCK : (j + 1) * BLOCK].mean(0) for j in range(t // BLOCK)]


def check(scores: Summarised | NativeSparse, expected: Tensor) -> None:
    """A sequence, and its last token over a cache with room for more."""
    q, k, v, x = drawn()
    torch.testing.assert_close(
        scores(q, k, v, Sight(POSITION, POSITION, KEEPS_ALL, {}, {}, None, 0, x)), expected
    )
    room = [torch.cat([each, torch.zeros(1, 2, 6, DIM, dtype=each.dtype)], 2) for each in (k, v)]
    sight = Sight(POSITION[-1:], torch.arange(LENGTH + 6), KEEPS_ALL, {}, {}, None, 0, x[:, -1:])
    torch.testing.assert_close(scores.step(q[:, :, -1:], *room, sight), expected[:, :, -1:])


def test_summaries_stand_for_earlier_blocks() -> None:
    q, k, v, _ = drawn()
    expected = torch.zeros(1, 4, LENGTH, DIM, dtype=torch.float64)
    for h in range(4):
        keys, values = k[0, h // 2], v[0, h // 2]
        for t in range(LENGTH):
            own = [(keys[s], values[s]) for s in range(t // BLOCK * BLOCK, t + 1)]
            blocks = list(zip(means(keys, t), means(values, t), strict=True))
            expected[0, h, t], _ = attention(q[0, h, t], own + blocks)
    check(Summarised(BLOCK, DIM**-0.5), expected)


def test_native_sparse_attention_is_three_attentions() -> None:
    q, k, v, x = drawn()
    torch.manual_seed(0)
    scores = NativeSparse(WIDTH, heads=4, block=BLOCK, count=3, window=5, scale=DIM**-0.5).double()
    gate = torch.sigmoid(x[0] @ scores.gate.weight.T).reshape(LENGTH, 4, 3)
    expected = torch.zeros(1, 4, LENGTH, DIM, dtype=torch.float64)
    for g in range(2):
        keys, values = k[0, g], v[0, g]
        for t in range(LENGTH):
            pairs = list(zip(means(keys, t), means(values, t), strict=True))
            found = {h: attention(q[0, h, t], pairs) for h in (2 * g, 2 * g + 1)} if pairs else {}
            weight = [sum(found[h][1][j] for h in found) for j in range(len(pairs))]
            blocks = {t // BLOCK, *sorted(range(len(pairs)), key=lambda j: -weight[j])[:2]}
            chosen = [(keys[s], values[s]) for s in range(t + 1) if s // BLOCK in blocks]
            near = [(keys[s], values[s]) for s in range(max(0, t - 4), t + 1)]
            for h in (2 * g, 2 * g + 1):
                terms = [found[h][0] if pairs else torch.zeros(DIM, dtype=torch.float64)]
                terms += [attention(q[0, h, t], part)[0] for part in (chosen, near)]
                expected[0, h, t] = sum(gate[t, h, i] * term for i, term in enumerate(terms))
    check(scores, expected)
