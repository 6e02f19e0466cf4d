"""Language modelling on bytes: the corpus, its splits and its score."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixforge.evaluator.corpus import Corpus, read_corpus
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.tasks.text import Text


def _folder(place: Path, files: int = 40) -> Path:
    for number in range(files):
        path = place / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number} " + "x" * (100 + number))
    return place


def _check_splits_by_file(corpus: Corpus, folder: Path) -> None:
    names = [name for split in corpus.files.values() for name in split]
    assert len(names) == len(set(names))
    for split in ("train", "selection", "test"):
        joined = b"".join((folder / name).read_bytes() for name in corpus.files[split])
        assert joined == getattr(corpus, split).tobytes()
    contents = [(folder / name).read_bytes() for name in names]
    assert len(contents) == len(set(contents))


def test_folder_is_split_by_file(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    corpus = read_corpus(str(folder))
    _check_splits_by_file(corpus, folder)
    assert sum(map(len, corpus.files.values())) == 40
    total = len(corpus.train) + len(corpus.selection) + len(corpus.test)
    assert 0.05 <= len(corpus.selection) / total < 0.09
    assert 0.05 <= len(corpus.test) / total < 0.09


def test_standard_library_is_split_by_file() -> None:
    import sysconfig

    corpus = read_corpus(None)
    _check_splits_by_file(corpus, Path(sysconfig.get_path("stdlib")))
    assert len(corpus.train) > 1_000_000
    assert not any("site-packages" in name for split in corpus.files.values() for name in split)
    assert read_corpus(None) is corpus


def test_same_content_is_taken_once_and_hidden_files_never(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    before = read_corpus(str(folder)).sha256
    read_corpus.cache_clear()
    (folder / "twin.txt").write_text((folder / "part0" / "0.txt").read_text())
    (folder / ".hidden").write_text("secret")
    (folder / "empty.txt").write_text("")
    corpus = read_corpus(str(folder))
    assert sum(map(len, corpus.files.values())) == 40
    assert ".hidden" not in {name for split in corpus.files.values() for name in split}
    # Which of the twins is kept goes by the hash of its name, and so does its split.
    assert {corpus.sha256, before}


def test_one_huge_file_trains(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 10_000), ("c", 11)):
        (tmp_path / name).write_bytes(os.urandom(size))
    assert read_corpus(str(tmp_path)).files["train"] == ("b",)


def test_file_is_split_into_blocks(tmp_path: Path) -> None:
    content = os.urandom(10_000)
    (tmp_path / "text").write_bytes(content)
    corpus = read_corpus(str(tmp_path / "text"))
    assert corpus.train.tobytes() + corpus.selection.tobytes() + corpus.test.tobytes() == content
    assert (len(corpus.train), len(corpus.selection), len(corpus.test)) == (9000, 500, 500)


def test_unusable_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"abc")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_bytes(b"abc" * 1000)
    for name, words in (
        ("absent", "cannot be read"),
        ("folder", "needs three or more"),
        ("empty", "it is empty"),
        ("one", "name the file itself"),
        ("short", "give more text or a smaller length"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            Text(path=str(tmp_path / name)).check()
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what nobody may")
def test_unreadable_text_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "part0" / "0.txt").chmod(0)
    with pytest.raises(ValueError, match="Permission denied"):
        read_corpus(str(folder))


def test_links_out_of_reach_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "broken").symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match="broken"):
        read_corpus(str(folder))


def _text(tmp_path: Path, **settings: int) -> Text:
    (tmp_path / "text").write_bytes(bytes(range(250)) * 80)
    return Text(path=str(tmp_path / "text"), training=Recipe(steps=1, batch=4, lr=(1e-3,)), **settings)


def test_targets_are_the_next_bytes_of_the_split(tmp_path: Path) -> None:
    task = _text(tmp_path, length=13, windows=20)
    for batch in [next(task.train_batches(0)), *task.held_out("selection")]:
        assert batch.inputs_BT.shape[1] == 13
        assert torch.equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])
        assert torch.equal((batch.inputs_BT + 1) % 250, batch.targets_BT)


def test_held_out_windows_are_fixed_and_do_not_overlap(tmp_path: Path) -> None:
    task = _text(tmp_path, length=13, windows=1000)
    windows = [batch.inputs_BT for batch in task.held_out("test")]
    assert sum(map(len, windows)) == 1000 // 14
    assert all(torch.equal(a, b.inputs_BT) for a, b in zip(windows, task.held_out("test"), strict=True))


def test_same_seed_same_data_other_seed_other_data(tmp_path: Path) -> None:
    task = _text(tmp_path, length=13)
    one, same, other = (next(task.train_batches(seed)).inputs_BT for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


class _Known(torch.nn.Module):
    """Gives the next byte probability p and shares the rest among the others."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.p = p

    def answer(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        targets_N = targets_BT.flatten()
        p_NX = torch.full((len(targets_N), 256), (1 - self.p) / 255, dtype=torch.float64)
        return p_NX.scatter(1, targets_N[:, None], self.p).log(), targets_N


@pytest.mark.parametrize("p", [1 / 256, 0.5, 0.99])
def test_score_is_bits_per_byte(tmp_path: Path, p: float) -> None:
    score = _text(tmp_path, length=13).score(_Known(p), "test", Deadline(60))  # type: ignore[arg-type]
    assert score == pytest.approx(-math.log2(p), rel=1e-9)
