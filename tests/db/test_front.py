"""The front equals what the definition says, under ties, NaN and any order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mixforge.db.front import directed, non_dominated, ranks

# Few distinct values, so that ties are common.
points = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.sampled_from([0.0, 1.0, 2.0, 3.0, np.inf, np.nan]),
)


def beats(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def brute_front(values):
    return [not np.isnan(a).any() and not any(beats(b, a) for b in values) for a in values]


@given(points)
def test_front_is_what_nothing_beats(values):
    assert non_dominated(values).tolist() == brute_front(values)


@given(points, st.randoms(use_true_random=False))
def test_order_does_not_matter(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    assert non_dominated(values[order]).tolist() == non_dominated(values)[order].tolist()


@given(points)
def test_ranks_peel_fronts(values):
    expected = np.full(len(values), -1)
    left = [index for index, value in enumerate(values) if not np.isnan(value).any()]
    peeled = 0
    while left:
        front = [a for a in left if not any(beats(values[b], values[a]) for b in left)]
        expected[front] = peeled
        left = [index for index in left if index not in front]
        peeled += 1
    expected[expected == -1] = peeled
    assert ranks(values).tolist() == expected.tolist()


def test_no_points():
    assert non_dominated(np.empty((0, 3))).tolist() == []
    assert ranks(np.empty((0, 3))).tolist() == []


def test_larger_is_better_for_recall():
    values = np.array([[0.9, 2.0], [0.8, 1.0], [0.7, 3.0]])
    assert non_dominated(directed(values, ("recall", "decode_ms"))).tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"'recal' is not a figure.*recall"):
        directed(values, ("recal", "decode_ms"))
