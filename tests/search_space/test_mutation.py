"""Mutation, crossover and neighbours: every child is a sentence of its space, and differs where it says."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mixforge.search_space.derivation import Derivation
from mixforge.search_space.grammar import Space
from mixforge.search_space.mutation import MUTATIONS, Operator, Variation, cross, mutate
from mixforge.search_space.neighbours import neighbours
from mixforge.search_space.notation import from_json
from tests.search_space.spaces import SPACES


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> Space:
    return SPACES[request.param]


def unasked(name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
    raise AssertionError(f"{name} was not answered")


def check(space: Space, derivation: Derivation) -> None:
    """It is a sentence of the space, is there again from its picks, and its architecture crosses JSON."""
    assert space.replay(derivation.picks, unasked) == derivation
    architecture = derivation.architecture
    found = space.contains(architecture)
    assert found is not None
    assert found.architecture == architecture
    assert from_json(architecture.canonical_json).digest == architecture.digest


@pytest.mark.parametrize("operator", MUTATIONS)
def test_a_mutated_sentence_is_of_its_space(space: Space, operator: Operator) -> None:
    rng = random.Random(1)
    made = 0
    for _ in range(25):
        parent = space.draw(rng)
        child = MUTATIONS[operator](space, parent, rng)
        if child is None:
            continue
        made += 1
        assert child.operator == operator
        assert child.derivation.picks != parent.picks
        check(space, child.derivation)
    # Only a space without repeats and recursion has nowhere to insert or delete.
    repeats = space in (SPACES["one line"], SPACES["same places"])
    assert made > 0 or (repeats and operator in ("insert", "delete"))


def test_crossed_sentences_are_of_their_space(space: Space) -> None:
    rng = random.Random(2)
    made = 0
    for _ in range(25):
        first, second = space.draw(rng), space.draw(rng)
        children = cross(space, first, second, rng)
        if children is None:
            continue
        made += 1
        for child in children:
            check(space, child.derivation)
            assert child.operator == "cross"
    assert made > 5


def test_an_exchange_keeps_what_the_parents_decided() -> None:
    space, rng = SPACES["one line"], random.Random(0)
    for _ in range(30):
        first, second = space.draw(rng), space.draw(rng)
        children = cross(space, first, second, rng)
        assert children is not None
        taken = Counter(child.taken for each in children for child in each.derivation.choices)
        assert taken == Counter(choice.taken for each in (first, second) for choice in each.choices)
        swapped = MUTATIONS["swap"](space, first, rng)
        if swapped is not None:
            assert Counter(swapped.derivation.picks.values()) == Counter(first.picks.values())


def test_the_same_seed_gives_the_same_child(space: Space) -> None:
    parent, other = space.draw(random.Random(5)), space.draw(random.Random(6))
    assert mutate(space, parent, random.Random(7)) == mutate(space, parent, random.Random(7))
    assert cross(space, parent, other, random.Random(8)) == cross(space, parent, other, random.Random(8))


def test_items_are_added_and_taken_away_whole() -> None:
    rng = random.Random(3)
    for space, sizes in ((SPACES["copies"], {1: 2, 2: 4}), (SPACES["recursion"], {})):
        for _ in range(40):
            parent = space.draw(rng)
            items = [str(node.expression) for node in parent.root.walk() if node.symbol in ("group", "layer")]
            child = MUTATIONS["insert"](space, parent, rng)
            if child is None:
                continue
            grown = [
                str(node.expression)
                for node in child.derivation.root.walk()
                if node.symbol in ("group", "layer")
            ]
            assert len(grown) == sizes.get(len(items), len(grown))
            rest = iter(grown)
            assert all(item in rest for item in items), "what was there stays, in its order"
            shrunk = MUTATIONS["delete"](space, child.derivation, rng)
            assert shrunk is not None
            rest = iter(grown)
            left = [
                str(node.expression)
                for node in shrunk.derivation.root.walk()
                if node.symbol in ("group", "layer")
            ]
            assert len(left) < len(grown)
            assert all(item in rest for item in left)


def test_a_gene_changes_one_choice_and_keeps_the_rest(space: Space) -> None:
    rng = random.Random(4)
    for _ in range(30):
        parent = space.draw(rng)
        child = MUTATIONS["gene"](space, parent, rng)
        assert child is not None
        before, after = parent.picks, child.derivation.picks
        differing = [name for name in before if name in after and before[name] != after[name]]
        assert differing == [child.place]


def by_hand(space: Space, derivation: Derivation) -> list[Variation]:
    """What is one choice away, from the listing of the whole space."""
    found = []
    for other in space.enumerate():
        both = [name for name in derivation.picks if name in other.picks]
        differing = [name for name in both if derivation.picks[name] != other.picks[name]]
        if len(differing) == 1:
            found.append(Variation(derivation=other, operator="gene", place=differing[0]))
    return found


@pytest.mark.parametrize("name", ["one line", "same places", "copies", "branches"])
def test_neighbours_are_those_of_the_listing(name: str) -> None:
    space = SPACES[name]
    if space.count() > 20_000:
        space = Space.from_table({
            "start": "lm(any(1, 2) ** any(linear(rule=any(add, delta), decay=any(none, scalar)), conv), width=64)"
        })  # fmt: skip
    parent = space.draw(random.Random(11))
    wanted = {tuple(each.derivation.picks.items()): each.place for each in by_hand(space, parent)}
    listed = list(neighbours(space, parent, every=True))
    found = {tuple(each.derivation.picks.items()): each.place for each in listed}
    assert len(found) == len(listed)
    assert found == wanted
    first = list(neighbours(space, parent))
    assert len(first) == sum(len(choice.options) - 1 for choice in parent.choices)
    assert {tuple(each.derivation.picks.items()) for each in first} <= found.keys()


def test_a_mutation_without_a_place_says_so() -> None:
    rng = random.Random(0)
    fixed = Space.from_text("lm(attn, width=64)")
    with pytest.raises(ValueError, match="the space has one sentence"):
        mutate(fixed, fixed.draw(rng), rng)
    space = SPACES["one line"]
    with pytest.raises(ValueError, match="no place of this sentence takes insert"):
        mutate(space, space.draw(rng), rng, ("insert",))
    with pytest.raises(ValueError, match="operator 'grow' is no mutation"):
        mutate(space, space.draw(rng), rng, ("grow",))  # type: ignore[arg-type]
