"""The distance of derivations is a metric, and a diff says what it counts."""

from __future__ import annotations

import random
from itertools import product

import pytest

from mixforge.search_space.derivation import Derivation
from mixforge.search_space.diff import architecture_diff, diff
from mixforge.search_space.distance import distance
from mixforge.search_space.grammar import Space
from mixforge.search_space.neighbours import neighbours
from mixforge.search_space.notation import parse
from tests.search_space.spaces import SPACES


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> Space:
    return SPACES[request.param]


def test_distance_is_a_metric(space: Space) -> None:
    rng = random.Random(0)
    drawn = [space.draw(rng) for _ in range(14)]
    # Near ones as well: the triangle is tightest there.
    drawn += [each.derivation for each in list(neighbours(space, drawn[0]))[:8]]
    between = {(i, j): distance(drawn[i], drawn[j]) for i, j in product(range(len(drawn)), repeat=2)}
    for i, j in between:
        assert between[i, j] == between[j, i]
        assert (between[i, j] == 0) == (drawn[i].picks == drawn[j].picks)
    for i, j, k in product(range(len(drawn)), repeat=3):
        assert between[i, k] <= between[i, j] + between[j, k]


def test_distance_of_neighbours_is_one_and_what_came_and_went(space: Space) -> None:
    rng = random.Random(1)
    ones = 0
    for _ in range(6):
        parent = space.draw(rng)
        for neighbour in neighbours(space, parent):
            picks = neighbour.derivation.picks
            came_and_went = len(parent.picks.keys() ^ picks.keys())
            far = distance(parent, neighbour.derivation)
            assert 1 <= far <= 1 + came_and_went
            ones += far == 1
    assert ones > 0


def total(first: Derivation, second: Derivation) -> int:
    """The distance without any alignment: names that differ or that only one has."""
    names = first.picks.keys() | second.picks.keys()
    return sum(first.picks.get(name) != second.picks.get(name) for name in names)


def test_distance_without_sequences_counts_names() -> None:
    rng = random.Random(2)
    space = SPACES["same places"]
    for _ in range(50):
        first, second = space.draw(rng), space.draw(rng)
        assert distance(first, second) == total(first, second)


@pytest.mark.parametrize(
    ("start", "rules", "shorter", "longer", "far"),
    [
        # One copy more in front: the number, and the copy's one choice.
        ("lm(any(2, 3) ** any(attn, conv, gdn), width=64)", {}, "attn + conv", "gdn + attn + conv", 2),
        # One turn more in front: the choice to go on, and the layer's one choice.
        (
            "lm(s, width=64)",
            {"s": "any(layer, layer + s)", "layer": "any(attn, conv, gdn)"},
            "attn + conv",
            "gdn + (attn + conv)",
            2,
        ),
    ],
)
def test_an_item_in_front_costs_the_item(
    start: str, rules: dict[str, str], shorter: str, longer: str, far: int
) -> None:
    space = Space.from_table({"start": start, "rules": rules})
    first = space.contains(parse(f"lm({shorter}, width=64)"))
    second = space.contains(parse(f"lm({longer}, width=64)"))
    assert first is not None
    assert second is not None
    assert distance(first, second) == far
    assert total(first, second) > far


def test_a_diff_says_every_edit_in_words() -> None:
    space = Space.from_table({
        "start": "lm(stack, width=any(64, 128))",
        "rules": {
            "stack": "any(2, 3) ** group",
            "group": "any(1, 3, 6) * (token + swiglu)",
            "token": "any(linear(decay=any(none, scalar, channel)), attn(window=any(none, 64)))",
        },
    })  # fmt: skip
    first = space.contains(parse("lm(2 * (3 * (linear(decay=scalar) + swiglu)), width=64)"))
    second = space.contains(
        parse("lm(6 * (linear(decay=channel) + swiglu) + 3 * (attn + swiglu) + attn + swiglu, width=128)")
    )
    assert first is not None
    assert second is not None
    assert diff(first, second) == (
        "stack: 2 copies became 3",
        "width: 64 became 128",
        "group[0]: 3 copies became 6",
        "group[0]/token/linear.decay: scalar became channel",
        "group[1]: 1 * (attn(window=none) + swiglu) is new",
        "group[1]/token: linear(decay=scalar) became attn(window=none)",
    )
    assert diff(second, first)[0] == "stack: 3 copies became 2"
    assert diff(second, first)[-2] == "group[1]: 1 * (attn(window=none) + swiglu) is gone"


def test_a_diff_is_empty_for_equal_picks_alone(space: Space) -> None:
    rng = random.Random(3)
    for _ in range(20):
        first, second = space.draw(rng), space.draw(rng)
        assert (not diff(first, second)) == (first.picks == second.picks)
        assert not diff(first, first)


def test_architectures_are_told_apart_layer_by_layer() -> None:
    first = parse("lm(3 * (gdn + swiglu) + attn + swiglu, width=64)")
    assert architecture_diff(first, first) == ()
    second = parse("lm(2 * (gdn(conv=none) + swiglu) + attn(window=64) + geglu + mlp, width=96, norm=layer)")
    assert architecture_diff(first, second) == (
        "width: 64 became 96",
        "norm: rms became layer",
        "layers 1 to 2: gdn + swiglu are gone",
        "layers 3, 5: linear.conv: 4 became none",
        "layer 7: attn.window: none became 64",
        "layer 8: glu.act: silu became gelu",
        "layer 7: mlp is new",
    )
    third = parse("lm(3 * (gdn + swiglu) + (attn | conv) + swiglu, width=64)")
    assert architecture_diff(first, third) == ("layer 7: attn became attn | conv",)
