"""State tracking: read elements of a group and say, at each of them, the product of all so far.

    inputs g1 g2 g3 ...            targets g1, g1 g2, g1 g2 g3, ...

The groups are those of permutations: the cyclic Zn (parity is Z2), the symmetric Sn and the alternating An. A5 and
S5 are not solvable, so their word problem is complete for NC1, which fixed numbers of attention layers and diagonal
recurrences are conjectured not to reach; parity needs a transition with a negative eigenvalue. An element is a
token, numbered in lexicographic order of the permutations, the identity first.

Held-out sequences are longer than training ones, and what is scored is what lies past the training length. Where
both have one length, everything is scored.

Source: Merrill, Petty and Sabharwal 2024 (arXiv 2404.08819, section 5): elements drawn uniformly, a label at each
of them. Grazzi et al. 2024 (arXiv 2411.12537, section 5): training on short sequences, scoring on longer ones.
Departures: the score is the mean over all scored positions, not one figure a length; a sequence belongs to one
split by a hash of as many of its elements as a training sequence has, so that the splits are disjoint by
construction and no held-out sequence begins as one that was trained on.

`state_tracking_certificate.toml` holds what known architectures reach.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.scoring import fraction_right
from mixforge.evaluator.splits import FEWEST_SEQUENCES, held_out_batches, training_batches
from mixforge.evaluator.task import Batch, HeldOut, Task

_GROUP = re.compile(r"([ZSA])([1-9][0-9]?)")
# The smallest group with two elements, and the largest with at most 120, of each kind.
_DEGREES = {"Z": range(2, 100), "S": range(2, 6), "A": range(3, 6)}
_TRAINING = Recipe(steps=300, batch=32, lr=(3e-3,))


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTracking(Task):
    """Fraction of products named right, past the training length."""

    figure: ClassVar[str] = "tracking"

    group: str = "parity"
    """parity, Z2 to Z99, S2 to S5, A3 to A5."""
    length: int = 16
    """Elements in a training sequence."""
    held_out_length: int = 64
    """Elements in a held-out sequence."""
    examples: int = 256
    """Sequences in each held-out split."""
    training: Recipe = _TRAINING

    def __post_init__(self) -> None:
        size = len(elements(self.group))
        if not 1 <= self.length <= 1_048_576:
            raise ValueError(f"length {self.length} is not between 1 and 1048576 elements")
        if not self.length <= self.held_out_length <= 1_048_576:
            raise ValueError(
                f"held_out_length {self.held_out_length} is not between {self.length}, the length of a training "
                "sequence, and 1048576"
            )
        if not 1 <= self.examples <= 1_048_576:
            raise ValueError(f"examples {self.examples} is not between 1 and 1048576")
        # 2**10 sequences are enough, so no longer power needs to be taken.
        if (sequences := size ** min(self.length, 10)) < FEWEST_SEQUENCES:
            raise ValueError(
                f"group {self.group} and length {self.length} allow {sequences} different sequences, too few to "
                f"split; {FEWEST_SEQUENCES} or more are needed"
            )

    @property
    def vocab(self) -> int:
        return len(elements(self.group))

    def train_batches(self, seed: int) -> Iterator[Batch]:
        return training_batches(self._draw, self.training.batch, seed)

    def held_out(self, split: HeldOut) -> Iterator[Batch]:
        return held_out_batches(
            self._draw_longer,
            split,
            self.examples,
            task="state_tracking",
            length=self.held_out_length,
            prefix=self.length,
        )

    def score(self, candidate: Candidate, split: HeldOut, deadline: Deadline) -> float:
        """Fraction of scored positions whose likeliest token is the product."""
        return fraction_right(candidate, self.held_out(split), deadline, "scoring state_tracking")

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        return self._sequences(count, self.length, generator)

    def _draw_longer(self, count: int, generator: torch.Generator) -> Batch:
        drawn = self._sequences(count, self.held_out_length, generator)
        if self.held_out_length > self.length:
            drawn.targets_BT[:, : self.length] = -1
        return drawn

    def _sequences(self, count: int, length: int, generator: torch.Generator) -> Batch:
        table_XX = products(self.group)
        inputs_BT = torch.randint(self.vocab, (count, length), generator=generator)
        targets_BT = torch.empty_like(inputs_BT)
        product_B = torch.zeros(count, dtype=torch.int64)
        for at in range(length):
            product_B = table_XX[product_B, inputs_BT[:, at]]
            targets_BT[:, at] = product_B
        return Batch(inputs_BT, targets_BT)


@lru_cache
def elements(group: str) -> tuple[tuple[int, ...], ...]:
    """The permutations of a group, in lexicographic order, so that the identity is the first.

    Raises ValueError for a name that is no group.
    """
    match = _GROUP.fullmatch("Z2" if group == "parity" else group)
    if match is None or int(match[2]) not in _DEGREES[match[1]]:
        raise ValueError(
            f"group {group!r} is none that can be tracked; write parity, Z2 to Z99, S2 to S5 or A3 to A5"
        )
    degree = int(match[2])
    if match[1] == "Z":
        return tuple(tuple((at + turn) % degree for at in range(degree)) for turn in range(degree))
    every = tuple(itertools.permutations(range(degree)))
    return every if match[1] == "S" else tuple(one for one in every if _is_even(one))


@lru_cache
def products(group: str) -> Tensor:
    """The group's table: element i, then element j, is element [i, j]."""
    every = elements(group)
    number = {one: index for index, one in enumerate(every)}
    return torch.tensor([[number[tuple(second[at] for at in first)] for second in every] for first in every])


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0
