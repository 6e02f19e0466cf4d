"""Repair: what is outside comes inside by small changes, or it is said that no way was found."""

from __future__ import annotations

import random

import pytest

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.distance import distance
from mixforge.search_space.grammar import Rejection, Space
from mixforge.search_space.neighbours import neighbours
from mixforge.search_space.repair import repair

RULES = {
    "start": "lm(any(2, 4, 6) ** block, width=any(32, 48, 64))",
    "rules": {
        "block": "mixer + any(swiglu, mlp(expand=any(2, 4)))",
        "mixer": "any(attn(window=any(none, 32), heads=any(1, 2, 3)), gdn, conv)",
    },
}


@pytest.mark.parametrize(
    "limits",
    [
        {"params": "<= 6e4"},
        {"params": ">= 1e5, <= 1.2e5"},
        {"params": "<= 8e4", "state_bytes": "<= 3e5 at 1024", "depth": ">= 8"},
    ],
)
def test_repaired_sentences_are_candidates_near_the_drawn_ones(limits: dict[str, str]) -> None:
    space, rng = Space.from_table({**RULES, "limits": limits}), random.Random(0)
    refused = repaired = 0
    for _ in range(12):
        drawn = space.draw(rng)
        if isinstance(space.admit(drawn), Architecture):
            unchanged = repair(space, drawn, rng)
            assert unchanged is not None
            assert (unchanged.derivation, unchanged.changes) == (drawn, 0)
            continue
        refused += 1
        found = repair(space, drawn, rng)
        if found is not None:
            repaired += 1
            assert space.admit(found.derivation) == found.architecture
            assert found.changes == distance(drawn, found.derivation) > 0
            again = space.contains(found.architecture)
            assert again is not None
    assert refused > 3
    assert repaired >= 0.8 * refused


def test_one_change_is_found_where_one_is_enough() -> None:
    space, rng = Space.from_table({**RULES, "limits": {"params": "<= 1.2e5"}}), random.Random(1)
    checked = 0
    for _ in range(60):
        drawn = space.draw(rng)
        if not isinstance(space.admit(drawn), Rejection) or len(drawn.choices) > 16:
            continue
        near = [each for each in neighbours(space, drawn) if distance(drawn, each.derivation) == 1]
        enough = any(isinstance(space.admit(each.derivation), Architecture) for each in near)
        found = repair(space, drawn, rng)
        assert found is not None
        if enough:
            checked += 1
            assert found.changes == 1
    assert checked > 3


def test_no_way_inside_is_said() -> None:
    space = Space.from_table({**RULES, "limits": {"params": "<= 1e3"}})
    assert repair(space, space.draw(random.Random(0)), random.Random(0)) is None
    faulty = Space.from_text("lm(any(mlp, swiglu), width=64)")
    assert repair(faulty, faulty.draw(random.Random(0)), random.Random(0)) is None


def test_too_deep_a_stack_is_cut() -> None:
    space = Space.from_text("lm(any(2, 1000) * (any(2, 3) * any(attn, conv)), width=16)")
    deep = space.sentence(space.count() - 1)
    assert isinstance(space.admit(deep), Rejection)
    found = repair(space, deep, random.Random(0))
    assert found is not None
    assert (found.changes, found.architecture.depth) == (1, 6)
