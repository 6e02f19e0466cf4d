"""Exact hypervolume against inclusion and exclusion, the formula that needs no cleverness."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixforge.db.hypervolume import hypervolume, hypervolume_history, reference_point

points = st.integers(1, 4).flatmap(
    lambda objectives: arrays(
        np.float64,
        st.tuples(st.integers(0, 7), st.just(objectives)),
        elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, np.nan]),
    )
)


def brute_volume(values, reference):
    """Sum over all sets of boxes of the volume they share, added and subtracted in turn."""
    inside = [value for value in values if (value < reference).all()]
    return sum(
        (-1) ** (size + 1) * float(np.prod(reference - np.max(chosen, axis=0)))
        for size in range(1, len(inside) + 1)
        for chosen in combinations(inside, size)
    )


@given(points)
def test_volume_is_exact(values):
    reference = np.ones(values.shape[1])
    assert hypervolume(values, reference) == pytest.approx(brute_volume(values, reference), abs=1e-12)


@given(points)
def test_history_is_of_each_beginning(values):
    reference = np.ones(values.shape[1])
    expected = [hypervolume(values[: count + 1], reference) for count in range(len(values))]
    assert hypervolume_history(values, reference) == pytest.approx(expected, abs=1e-12)


def test_known_volume():
    # Two boxes of 2 and one they share of 1.
    assert hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([3.0, 3.0])) == 3.0
    sphere = np.random.default_rng(0).normal(size=(60, 4))
    assert 0 < hypervolume(sphere, np.full(4, 3.0)) < 8.0**4


def test_reference_is_beyond_the_worst():
    values = np.array([[1.0, 10.0], [2.0, 10.0], [np.nan, 99.0]])
    assert reference_point(values).tolist() == [2.1, 11.0]
    assert hypervolume(values, reference_point(values)) > 0
    with pytest.raises(ValueError, match="no measured point"):
        reference_point(np.array([[np.nan, 1.0]]))
