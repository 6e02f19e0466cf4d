"""Language modelling on bytes: bits per byte of a file, a folder, or Python's own standard library.

Training reads windows at random places. A held-out score is the mean over a fixed set of windows, spread
evenly over the split, of -log2 p(next byte): every byte of a window but its first is predicted from those
before it in the window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.corpus import Bytes, Corpus, read_corpus
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.task import Batch, HeldOut, Task
from mixforge.search_space.count import counted

_SCORED_TOKENS = 8_192
_TRAINING = Recipe(steps=100, batch=8, lr=(3e-3,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Task):
    """Bits per byte on held-out text."""

    figure: ClassVar[str] = "bits_per_byte"
    keeps_weights: ClassVar[bool] = True

    path: str | None = None
    """A file or a folder; None for the standard library's source."""
    length: int = 256
    """Bytes that one window predicts."""
    windows: int = 64
    """Most windows in each held-out split."""
    training: Recipe = _TRAINING

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 1_048_576:
            raise ValueError(f"length {self.length} is not between 1 and 1048576 bytes")
        if not 1 <= self.windows <= 1_048_576:
            raise ValueError(f"windows {self.windows} is not between 1 and 1048576")

    @property
    def vocab(self) -> int:
        return 256

    def check(self) -> None:
        self._corpus()

    def identity(self) -> dict[str, object]:
        """The settings, with the text's digest in place of where it lies."""
        settings = dataclasses.asdict(self)
        settings["path"] = self._corpus().sha256
        return settings

    def train_batches(self, seed: int) -> Iterator[Batch]:
        train = self._corpus().train
        generator = np.random.default_rng(seed)
        while True:
            yield self._windows(train, generator.integers(0, len(train) - self.length, self.training.batch))

    def held_out(self, split: HeldOut) -> Iterator[Batch]:
        corpus = self._corpus()
        content = corpus.selection if split == "selection" else corpus.test
        count = min(self.windows, len(content) // (self.length + 1))
        starts = np.linspace(0, len(content) - self.length - 1, count).astype(np.int64)
        size = max(1, _SCORED_TOKENS // self.length)
        for first in range(0, count, size):
            yield self._windows(content, starts[first : first + size])

    def score(self, candidate: Candidate, split: HeldOut, deadline: Deadline) -> float:
        nats = 0.0
        count = 0
        device = next(candidate.parameters()).device
        for batch in self.held_out(split):
            deadline.check("scoring text")
            logits_NX, targets_N = candidate.answer(batch.inputs_BT.to(device), batch.targets_BT.to(device))
            nats += F.cross_entropy(logits_NX.double(), targets_N, reduction="sum").item()
            count += len(targets_N)
        return nats / count / math.log(2)

    def _corpus(self) -> Corpus:
        corpus = read_corpus(self.path)
        for name, split in (("train", corpus.train), ("selection", corpus.selection), ("test", corpus.test)):
            if len(split) < self.length + 1:
                raise ValueError(
                    f"{corpus.source} has {counted(len(split), 'byte')} for its {name} split, and a window of length "
                    f"{self.length} takes {self.length + 1}; give more text or a smaller length"
                )
        return corpus

    def _windows(self, content: Bytes, starts: np.typing.NDArray[np.int64]) -> Batch:
        windows_BT = torch.from_numpy(content[starts[:, None] + np.arange(self.length + 1)].astype(np.int64))
        return Batch(windows_BT[:, :-1].contiguous(), windows_BT[:, 1:].contiguous())
