"""What is stored of an architecture."""

from __future__ import annotations

from mixforge.db.values import describe
from mixforge.search_space.notation import parse


def test_architecture_is_described():
    architecture = parse("lm(3 * (attn + swiglu), width=32)")
    described = describe(architecture)
    assert (described.digest, described.width, described.depth) == (architecture.digest, 32, 6)
    assert described.text == str(architecture)
    assert described.canonical == architecture.canonical_json
    assert described.mixers == ("attn", "swiglu")
