"""Local linear and 2-simplicial attention against their papers' equations as float64 loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.attention import causal_attention_torch
from mixforge.search_space.parts.attention_blocks import Sight
from mixforge.search_space.parts.attention_local_linear import LocalLinear
from mixforge.search_space.parts.attention_pattern import EveryToken
from mixforge.search_space.parts.attention_simplicial import Simplicial

LENGTH, DIM = 19, 4
POSITION = torch.arange(LENGTH)
PATTERN = EveryToken(causal_attention_torch)


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_local_linear_attention_is_a_weighted_ridge_regression() -> None:
    q, k, v = drawn((4, LENGTH, DIM), (2, LENGTH, DIM), (2, LENGTH, DIM))
    scores = LocalLinear(4, DIM**-0.5).double()
    with torch.no_grad():
        scores.ridge.copy_(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    expected = torch.zeros(1, 4, LENGTH, DIM, dtype=torch.float64)
    for h, t in itertools.product(range(4), range(LENGTH)):
        keys, values = k[0, h // 2, : t + 1], v[0, h // 2, : t + 1]
        weight = torch.softmax(keys @ q[0, h, t] / math.sqrt(DIM), 0)
        design = torch.cat([torch.ones(t + 1, 1, dtype=torch.float64), keys - q[0, h, t]], 1)
        penalty = float(F.softplus(scores.ridge.detach()[h])) * torch.eye(DIM + 1, dtype=torch.float64)
        penalty[0, 0] = 0
        moments = design.T @ (weight[:, None] * design) + penalty
        expected[0, h, t] = torch.linalg.solve(moments, design.T @ (weight[:, None] * values))[0]
    sight = Sight(POSITION, POSITION, PATTERN, {}, {}, None, 0, q)
    torch.testing.assert_close(scores(q, k, v, sight).detach(), expected)
    room = [torch.cat([x, torch.zeros(1, 2, 3, DIM, dtype=x.dtype)], 2) for x in (k, v)]
    sight = Sight(POSITION[-1:], torch.arange(LENGTH + 3), PATTERN, {}, {}, None, 0, q[:, :, -1:])
    torch.testing.assert_close(scores.step(q[:, :, -1:], *room, sight).detach(), expected[:, :, -1:])


@pytest.mark.parametrize(("first", "second"), [(5, 3), (40, 2), (1, 1)])
def test_pairs_of_tokens_are_weighed(first: int, second: int) -> None:
    q, k, v = drawn((4, LENGTH, DIM), (2, LENGTH, 2 * DIM), (2, LENGTH, 2 * DIM))
    expected = torch.zeros(1, 4, LENGTH, DIM, dtype=torch.float64)
    for h, t in itertools.product(range(4), range(LENGTH)):
        pairs = list(
            itertools.product(range(max(0, t - first + 1), t + 1), range(max(0, t - second + 1), t + 1))
        )
        key, other = k[0, h // 2, :, :DIM], k[0, h // 2, :, DIM:]
        value, another = v[0, h // 2, :, :DIM], v[0, h // 2, :, DIM:]
        raised = {
            (i, j): math.exp(float((q[0, h, t] * key[i] * other[j]).sum()) / math.sqrt(DIM)) for i, j in pairs
        }
        for (i, j), each in raised.items():
            expected[0, h, t] += each / sum(raised.values()) * value[i] * another[j]
    scores = Simplicial(first, second, DIM**-0.5)
    found = scores(q, k, v, Sight(POSITION, POSITION, PATTERN, {}, {}, None, 0, q))
    torch.testing.assert_close(found, expected)
    room = [torch.cat([x, torch.zeros(1, 2, 3, 2 * DIM, dtype=x.dtype)], 2) for x in (k, v)]
    sight = Sight(POSITION[-1:], torch.arange(LENGTH + 3), PATTERN, {}, {}, None, 0, q[:, :, -1:])
    torch.testing.assert_close(scores.step(q[:, :, -1:], *room, sight), expected[:, :, -1:])
