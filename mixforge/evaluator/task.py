"""What a task is: data to train on, held-out data, and the score of a trained candidate.

A task is one file in `tasks/` with one final frozen dataclass whose fields are its settings. Its name is
its file's.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from mixforge.evaluator.candidate import Candidate, asked
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe

HeldOut = Literal["selection", "test"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and what is to be predicted from them, both int64.

    inputs_BT: what the model reads. targets_BT: the answer at each position, negative where none is asked.
    """

    inputs_BT: Tensor
    targets_BT: Tensor

    def to(self, device: str) -> Batch:
        return Batch(self.inputs_BT.to(device), self.targets_BT.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(ABC):
    """Training and two held-out splits, disjoint, and one figure."""

    # The name, in FIGURES, of what `score` yields.
    figure: ClassVar[str]
    # Whether a model trained here is of use outside, so that its weights are kept.
    keeps_weights: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Token ids run from 0 to vocab - 1."""

    @property
    @abstractmethod
    def training(self) -> Recipe: ...

    @abstractmethod
    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Training data without end: the same seed gives the same batches."""

    @abstractmethod
    def held_out(self, split: HeldOut) -> Iterator[Batch]:
        """All data of a held-out split: the same for every candidate and every seed."""

    @abstractmethod
    def score(self, candidate: Candidate, split: HeldOut, deadline: Deadline) -> float:
        """The task's figure on a held-out split. Raises TimedOut."""

    def front(self, width: int) -> nn.Module | None:
        """A module [B, T, D] -> [B, T, D] that the task puts between every embedding and stack."""
        return None

    def why_unasked(self, prefix: int) -> str | None:
        """None, or a sentence where a sequence asks nothing of a model that reads so many first tokens together.

        It looks at the first batch of each split.
        """
        batches = {"training": self.train_batches(0)} | {
            split: self.held_out(split) for split in get_args(HeldOut)
        }
        for split, drawn in batches.items():
            targets_BT = next(drawn).targets_BT
            if not asked(targets_BT, prefix).any(1).all():
                return (
                    f"a prefix of {prefix} tokens leaves nothing to predict in {split} sequences of {self.name}, which "
                    f"have {targets_BT.shape[1]} tokens; say a shorter prefix, or longer sequences in [tasks.{self.name}]"
                )
        return None

    def check(self) -> None:  # noqa: B027 - most tasks draw their data and have nothing to check
        """Raises ValueError where the data cannot be had."""

    def identity(self) -> dict[str, object]:
        """All that decides a score: settings, and a digest of data that is read.

        Goes into the budget's digest.
        """
        return dataclasses.asdict(self)
