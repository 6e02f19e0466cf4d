"""Names in a picture can all be read: none covers another, and marks in one place share one."""

from __future__ import annotations

import itertools
import random

import pytest

from mixforge.report.labels import Box, Place, labels

FRAME = Box(left=76, top=62, right=840, bottom=442)


def test_marks_in_one_place_share_a_label() -> None:
    names = [("hybrid_3to1", (300.0, 200.0)), ("gdn", (600.0, 200.0)), ("mamba2", (301.0, 202.0))]
    placed = labels(names, [place for _, place in names], FRAME)
    assert [each.text for each in placed] == ["hybrid_3to1, mamba2", "gdn"]
    assert [each.mark for each in placed] == [(300.0, 200.0), (600.0, 200.0)]


def test_a_label_stands_beside_a_mark_that_is_alone() -> None:
    (label,) = labels([("gdn", (300.0, 200.0))], [(300.0, 200.0)], FRAME)
    assert (label.at, label.anchor, label.ring) == ((300.0, 188.0), "middle", 0)


@pytest.mark.parametrize("spread", [2.0, 12.0, 60.0, 700.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_label_covers_another_or_leaves_the_frame(spread: float, seed: int) -> None:
    draw = random.Random(seed)
    x, y = draw.uniform(FRAME.left, FRAME.right), draw.uniform(FRAME.top, FRAME.bottom)
    words = ("gdn", "griffin", "hybrid_3to1", "mamba2", "parallel_hybrid", "transformer", "yoco", "retnet")

    def near(middle: float, low: float, high: float) -> float:
        return min(max(middle + draw.uniform(-spread, spread), low), high)

    names: list[tuple[str, Place]] = [
        (word, (near(x, FRAME.left, FRAME.right), near(y, FRAME.top, FRAME.bottom))) for word in words
    ]
    placed = labels(names, [place for _, place in names], FRAME)
    assert sorted(", ".join(each.text for each in placed).split(", ")) == sorted(words)
    assert not any(one.box.overlaps(other.box) for one, other in itertools.combinations(placed, 2))
    assert all(each.box.within(FRAME) for each in placed if len(each.text) < 60)


def test_of_two_near_marks_each_label_is_nearer_to_its_own() -> None:
    names = [("griffin", (300.0, 200.0)), ("gdn", (310.0, 197.0)), ("yoco", (304.0, 212.0))]
    placed = labels(names, [place for _, place in names], FRAME)
    for label in placed:
        assert label.box.distance(label.mark) == min(label.box.distance(each.mark) for each in placed)
