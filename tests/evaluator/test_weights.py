"""Kept weights: whole or not there, and known to be what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixforge.evaluator.weights import load_weights, save_weights
from mixforge.search_space.notation import parse


def test_round_trip_with_tied_and_reused_weights(tmp_path: Path) -> None:
    architecture = parse("lm(2 @ (attn + mlp), width=16)")
    model, other = architecture.build(seed=0), architecture.build(seed=1)
    save_weights(model, tmp_path / "w", {"architecture": str(architecture)})
    load_weights(other, tmp_path / "w")
    tokens_BT = torch.arange(7)[None]
    assert torch.equal(model(tokens_BT), other(tokens_BT))
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_flipped_bit_and_cut_file_are_seen(tmp_path: Path) -> None:
    model = parse("lm(attn, width=16)").build()
    path = tmp_path / "w"
    save_weights(model, path)
    content = bytearray(path.read_bytes())
    for at in (len(content) - 1, len(content) // 2):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|cannot be read"):
            load_weights(model, path)
    path.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(model, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(model, tmp_path / "absent")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_weights(parse("lm(attn, width=16)").build(), tmp_path / "w")
    for other in ("lm(attn, width=32)", "lm(attn + mlp, width=16)"):
        with pytest.raises(ValueError, match="another architecture"):
            load_weights(parse(other).build(), tmp_path / "w")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    save_weights(parse("lm(attn, width=16)").build(), path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(parse("lm(attn, width=32)").build(), path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["w"]
