"""Presets: legal, of growing size, distinct, and what their papers draw."""

from __future__ import annotations

import pytest
import torch

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import from_json, parse
from mixforge.search_space.presets import PRESETS, SIZES, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_legal_and_grow(name: str) -> None:
    tiny, small, published = (preset(name, size) for size in SIZES)
    for architecture in (tiny, small, published):
        assert isinstance(architecture, Architecture)
        assert architecture.why_illegal() is None
        assert parse(str(architecture)) == architecture
        stored = from_json(architecture.canonical_json)
        assert stored == architecture
        assert stored.digest == architecture.digest
    assert 30_000 < tiny.cost(256).params < 1_300_000
    assert 4 * tiny.cost(256).params < small.cost(256).params < published.cost(256).params


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train_and_step(name: str) -> None:
    model = preset(name).build(seed=1).train()
    tokens_BT = torch.arange(2 * 37).reshape(2, 37) % 251
    model(tokens_BT).logsumexp(-1).sum().backward()
    for weight_name, weight in model.named_parameters():
        assert weight.grad is not None, weight_name
        assert torch.isfinite(weight.grad).all(), weight_name
    model.eval()
    with torch.no_grad():
        whole_BTX = model(tokens_BT)
        _, state = model.prefill(tokens_BT[:, :33], capacity=37)
        for t in range(33, 37):
            logits_BX, state = model.step(tokens_BT[:, t], state)
            torch.testing.assert_close(logits_BX, whole_BTX[:, t], rtol=1e-3, atol=1e-3)


def test_presets_are_distinct_and_cite() -> None:
    assert len({preset(name).digest for name in PRESETS}) == len(PRESETS)
    for name, each in PRESETS.items():
        assert each.name == name
        assert "arXiv" in each.paper


def test_presets_read_as_their_papers() -> None:
    texts = {name: str(preset(name, "small")) for name in PRESETS}
    expected = {
        "transformer": "lm(12 * (attn + swiglu), width=512)",
        "gdn": "lm(12 * (gdn + swiglu), width=512)",
        "mamba2": "lm(24 * mamba2, width=512)",
        "griffin": "lm(4 * (2 * (rglru + geglu) + attn(kv=mqa, window=1024) + geglu), width=512)",
        "hybrid_3to1": "lm(3 * (3 * (gdn + swiglu) + attn + swiglu), width=512)",
        "parallel_hybrid": "lm(12 * (beside(1 * attn, 1 * mamba2, fuse=mean) + swiglu), width=512)",
        "yoco": "lm(6 * (attn(window=1024) + swiglu) + attn(kv=own) + swiglu"
        " + 5 * (attn(kv=shared) + swiglu), width=512)",
    }
    assert {name: texts[name] for name in expected} == expected


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'griffin'"):
        preset("grifin")
    with pytest.raises(ValueError, match="has no size 'huge'; it has tiny, small, published"):
        preset("gdn", "huge")  # type: ignore[arg-type]
