"""Presets: legal, of growing size, distinct, and what their papers draw."""

from __future__ import annotations

import pytest

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import parse
from mixforge.search_space.presets import PRESETS, SIZES, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_legal_and_grow(name: str) -> None:
    tiny, small = (preset(name, size) for size in SIZES)
    for architecture in (tiny, small):
        assert isinstance(architecture, Architecture)
        assert architecture.why_illegal() is None
        assert parse(str(architecture)) == architecture
    assert 100_000 < tiny.cost(256).params < 1_200_000
    assert 10 * tiny.cost(256).params < small.cost(256).params


def test_presets_are_distinct_and_cite() -> None:
    assert len({preset(name).digest for name in PRESETS}) == len(PRESETS)
    for name, each in PRESETS.items():
        assert each.name == name
        assert "arXiv" in each.paper


def test_presets_read_as_their_papers() -> None:
    texts = {name: str(preset(name, "small")) for name in PRESETS}
    assert texts == {
        "transformer": "lm(12 * (attn + swiglu), width=512)",
        "gdn": "lm(12 * (gdn + swiglu), width=512)",
        "mamba2": "lm(24 * mamba2, width=512)",
        "griffin": "lm(4 * (2 * (rglru + geglu) + attn(kv=mqa, window=1024) + geglu), width=512)",
        "hybrid_3to1": "lm(3 * (3 * (gdn + swiglu) + attn + swiglu), width=512)",
        "parallel_hybrid": "lm(12 * (beside(1 * attn, 1 * mamba2, fuse=mean) + swiglu), width=512)",
        "yoco": "lm(6 * (attn(window=1024) + swiglu) + attn(kv=own) + swiglu"
        " + 5 * (attn(kv=shared) + swiglu), width=512)",
    }


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'griffin'"):
        preset("grifin")
    with pytest.raises(ValueError, match="has no size 'huge'; it has tiny, small"):
        preset("gdn", "huge")  # type: ignore[arg-type]
