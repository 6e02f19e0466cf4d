"""Multi-query associative recall: read key-value pairs, then answer each key with its value.

    k1 v1 k2 v2 ... kP vP | k3 .  k1 .  . .  k7 . ...        target at k3: v3, at k1: v1, ...

Keys come from the lower half of the vocabulary, values from the upper half, both without repeats in one
sequence; token 0 fills the rest. Keys are asked again, each once, at slots drawn without replacement with
probability proportional to i^(a-1), a = 0.01, so most questions come soon after the pairs.

Source: Arora et al. 2023 (arXiv 2312.04927, section 4 and appendix C), and the setting of Arora et al. 2024
(arXiv 2402.18668), where a short convolution stands in front of every mixer. Departures: the short
convolution is the task's, in front of the whole stack, and starts as a shift by one token; a sequence
belongs to one split by a hash of its tokens, so that the splits are disjoint by construction.

Without the convolution a small budget measures whether an induction circuit happened to form, not how much
a mixer can recall. `mqar_certificate.toml` holds what known architectures reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.scoring import fraction_right
from mixforge.evaluator.shift_conv import ShiftConv
from mixforge.evaluator.splits import FEWEST_SEQUENCES, held_out_batches, training_batches
from mixforge.evaluator.task import Batch, HeldOut, Task

_POWER = 0.01
_TRAINING = Recipe(steps=150, batch=32, lr=(3e-3,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mqar(Task):
    """Fraction of questions answered right."""

    figure: ClassVar[str] = "recall"

    vocab: int = 16
    length: int = 24
    """Tokens in a sequence."""
    pairs: int = 6
    examples: int = 512
    """Sequences in each held-out split."""
    training: Recipe = _TRAINING

    def __post_init__(self) -> None:
        if not 4 <= self.vocab <= 1_048_576:
            raise ValueError(f"vocab {self.vocab} is not between 4 and 1048576")
        if not 1 <= self.pairs <= self.vocab // 2 - 1:
            raise ValueError(
                f"pairs {self.pairs} is not between 1 and {self.vocab // 2 - 1}: "
                f"a vocabulary of {self.vocab} has {self.vocab // 2 - 1} keys"
            )
        if not 4 * self.pairs <= self.length <= 1_048_576:
            raise ValueError(
                f"length {self.length} is not between {4 * self.pairs} and 1048576: "
                f"{self.pairs} pairs and their questions take {4 * self.pairs} tokens"
            )
        if not 1 <= self.examples <= 1_048_576:
            raise ValueError(f"examples {self.examples} is not between 1 and 1048576")
        if self._sequences() < FEWEST_SEQUENCES:
            raise ValueError(
                f"vocab {self.vocab}, length {self.length} and pairs {self.pairs} allow {self._sequences()} "
                f"different sequences, too few to split; {FEWEST_SEQUENCES} or more are needed"
            )

    def _sequences(self) -> int:
        """How many different sequences there are."""
        half = self.vocab // 2
        slots = (self.length - 2 * self.pairs) // 2
        return (
            math.perm(half - 1, self.pairs)
            * math.perm(self.vocab - half, self.pairs)
            * math.perm(slots, self.pairs)
        )

    def front(self, width: int) -> nn.Module:
        return ShiftConv(width)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        return training_batches(self._draw, self.training.batch, seed)

    def held_out(self, split: HeldOut) -> Iterator[Batch]:
        return held_out_batches(self._draw, split, self.examples, task="mqar", length=self.length)

    def score(self, candidate: Candidate, split: HeldOut, deadline: Deadline) -> float:
        """Fraction of questions whose likeliest next token, over the whole vocabulary, is the value."""
        return fraction_right(candidate, self.held_out(split), deadline, "scoring mqar")

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        half, pairs = self.vocab // 2, self.pairs
        keys_BP = _without_repeats(torch.zeros(count, half - 1), pairs, generator) + 1
        values_BP = _without_repeats(torch.zeros(count, self.vocab - half), pairs, generator) + half
        slots = (self.length - 2 * pairs) // 2
        weight = (_POWER - 1) * torch.arange(1, slots + 1).log()
        at_BP = 2 * pairs + 2 * _without_repeats(weight.expand(count, slots), pairs, generator)
        inputs_BT = torch.zeros(count, self.length, dtype=torch.int64)
        inputs_BT[:, : 2 * pairs] = torch.stack([keys_BP, values_BP], 2).flatten(1)
        inputs_BT.scatter_(1, at_BP, keys_BP)
        return Batch(inputs_BT, torch.full_like(inputs_BT, -1).scatter_(1, at_BP, values_BP))


def _without_repeats(log_weight_BN: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of N indices a row, in the order of weighted draws without replacement (Gumbel top-k)."""
    uniform_BN = torch.rand(log_weight_BN.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return (log_weight_BN - (-uniform_BN.log()).log()).topk(count, dim=1).indices
