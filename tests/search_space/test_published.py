"""Published search spaces: each draws, holds what it draws, and says where it is from."""

from __future__ import annotations

import random
import re

import pytest

from mixforge.search_space.grammar import Space
from mixforge.search_space.linter import survey
from mixforge.search_space.mutation import cross, mutate
from mixforge.search_space.notation import parse
from mixforge.search_space.published import published, published_names

NAMES = published_names()


def test_the_published_spaces_are_there() -> None:
    assert {
        "composer", "einspace", "hybrid_ratio", "mixforge", "mobilellm", "nas_efficient", "nemotron_flash", "star",
    } <= set(NAMES)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_published_space_says_its_paper_and_its_departures(name: str) -> None:
    space = published(name)
    assert space.summary
    assert space.departures
    assert name == "mixforge" or re.search(r"arXiv \d{4}\.\d{5}", space.paper)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_space_draws_and_varies(name: str) -> None:
    space, rng = Space.published(name), random.Random(0)
    assert space.count() > 20
    drawn = [space.draw_legal(rng) for _ in range(2)]
    for each in drawn:
        found = space.contains(each.architecture)
        assert found is not None
        assert found.architecture == each.architecture
    assert mutate(space, drawn[0].derivation, rng).derivation.picks != drawn[0].derivation.picks
    crossed = cross(space, drawn[0].derivation, drawn[1].derivation, rng)
    assert crossed is None or len(crossed) == 2
    assert survey(space, rng, draws=60).rate > 0.01


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("composer", "lm(2 * attn(heads=4, kv=mqa) + 4 * swiglu(expand=4), width=128)"),
        (
            "nemotron_flash",
            "lm(deltanet + swiglu + mamba2 + swiglu + attn(kv=gqa(2)) + swiglu + mamba2 + swiglu"
            " + 2 * (deltanet + swiglu + mamba2 + swiglu), width=256)",
        ),
        ("hybrid_ratio", "lm(8 * (3 * (gdn + swiglu) + attn + swiglu), width=256)"),
        (
            "mobilellm",
            "lm(30 * (attn(head_dim=64, kv=gqa(3)) + swiglu(expand=2.667)), width=576, vocab=32000)",
        ),
        (
            "mobilellm",
            "lm(15 * (2 @ (attn(head_dim=64, kv=gqa(3)) + swiglu(expand=2.667))), width=576, vocab=32000)",
        ),
        ("star", f"lm({' + '.join(12 * ['attn + swiglu'])}, width=128)"),
        ("einspace", "lm(2 * (beside(attn, conv, fuse=gate) + swiglu) + 2 @ (gdn + mlp), width=64)"),
        ("mixforge", "lm(2 * (3 * (gdn + swiglu) + attn(window=256) + swiglu), width=256)"),
    ],
)
def test_what_the_papers_found_is_in_their_spaces(name: str, text: str) -> None:
    architecture = parse(text)
    assert architecture.why_illegal() is None
    assert Space.published(name).contains(architecture) is not None


def test_a_campaign_takes_a_published_space_and_changes_it() -> None:
    space = Space.from_table({"published": "composer", "limits": {"params": "<= 1e6"}})
    assert space.count() == Space.published("composer").count() == 2**6 + 2**16
    assert [str(limit) for limit in space.limits] == ["params <= 1000000"]
    changed = Space.from_table({"published": "composer", "rules": {"primitive": "any(attn, conv, swiglu)"}})
    assert changed.count() == 3**6 + 3**16
    with pytest.raises(ValueError, match="did you mean 'composer'"):
        Space.published("composr")
    with pytest.raises(ValueError, match=r"space\.published: 3 is not a name"):
        Space.from_table({"published": 3})
