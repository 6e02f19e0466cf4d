"""The front equals what the definition says, under ties, NaN and any order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mixforge.db.front import directed, non_dominated

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
    assert non_dominated(values.tolist()) == brute_front(values)


@given(points, st.randoms(use_true_random=False))
def test_order_does_not_matter(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    marks = non_dominated(values.tolist())
    assert non_dominated(values[order].tolist()) == [marks[index] for index in order]


def test_no_points():
    assert non_dominated([]) == []


def test_larger_is_better_for_recall():
    values = [[0.9, 2.0], [0.8, 1.0], [0.7, 3.0]]
    assert non_dominated(directed(values, ("recall", "decode_ms"))) == [True, True, False]
    with pytest.raises(ValueError, match=r"'recal' is not a figure.*recall"):
        directed(values, ("recal", "decode_ms"))
