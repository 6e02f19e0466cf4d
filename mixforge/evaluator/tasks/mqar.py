"""Multi-query associative recall: read key-value pairs, then answer each key with its value.

    k1 v1 k2 v2 ... kP vP | k3 .  k1 .  . .  k7 . ...        target at k3: v3, at k1: v1, ...

Keys come from the lower half of the vocabulary, values from the upper half, both without repeats in one
sequence; token 0 fills the rest. Keys are asked again, each once, at slots drawn without replacement with
probability proportional to i^(a-1), a = 0.01, so most questions come soon after the pairs. With `rewrites`, so many
of the keys are then given another value, and the last one counts: what is recalled must first have been overwritten.

Source: Arora et al. 2023 (arXiv 2312.04927, section 4 and appendix C), and the setting of Arora et al. 2024
(arXiv 2402.18668), where a short convolution stands in front of every mixer. Departures: the short
convolution is the task's, in front of the whole stack, and starts as a shift by one token; a sequence
belongs to one split by a hash of its tokens, so that the splits are disjoint by construction.

Without the convolution a small budget measures whether an induction circuit happened to form, not how much
a mixer can recall. `mqar_certificate.toml` holds what known architectures reach.
"""

from __future__ import annotations

import dataclasses
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
from mixforge.search_space.count import counted

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
    rewrites: int = 0
    """Keys that are given a second value, which is then the right one."""
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
        most = min(self.pairs, self.vocab - self.vocab // 2 - self.pairs)
        if not 0 <= self.rewrites <= most:
            raise ValueError(
                f"rewrites {self.rewrites} is not between 0 and {most}: of {self.pairs} keys each is rewritten once "
                f"at most, and a vocabulary of {self.vocab} has {self.vocab - self.vocab // 2} values"
            )
        needed = self._context() + 2 * self.pairs
        if not needed <= self.length <= 1_048_576:
            raise ValueError(
                f"length {self.length} is not between {needed} and 1048576: "
                f"{counted(self.pairs, 'pair')}, {counted(self.rewrites, 'rewrite')} and their questions "
                f"take {needed} tokens"
            )
        if not 1 <= self.examples <= 1_048_576:
            raise ValueError(f"examples {self.examples} is not between 1 and 1048576")
        if self._sequences() < FEWEST_SEQUENCES:
            raise ValueError(
                f"vocab {self.vocab}, length {self.length} and pairs {self.pairs} allow {self._sequences()} "
                f"different sequences, too few to split; {FEWEST_SEQUENCES} or more are needed"
            )

    def _context(self) -> int:
        """Tokens before the questions."""
        return 2 * (self.pairs + self.rewrites)

    def _sequences(self) -> int:
        """How many different sequences there are, rewrites apart."""
        half = self.vocab // 2
        slots = (self.length - self._context()) // 2
        return (
            math.perm(half - 1, self.pairs)
            * math.perm(self.vocab - half, self.pairs)
            * math.perm(slots, self.pairs)
        )

    def identity(self) -> dict[str, object]:
        """The settings, without rewrites where there are none: budgets from before there were any stay the same."""
        settings = dataclasses.asdict(self)
        return settings if self.rewrites else {key: settings[key] for key in settings if key != "rewrites"}

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
        # A pair that is written later is one more of N writes, of which the first P have different keys.
        writes, context = pairs + self.rewrites, self._context()
        values_BN = _without_repeats(torch.zeros(count, self.vocab - half), writes, generator) + half
        slots = (self.length - context) // 2
        weight = (_POWER - 1) * torch.arange(1, slots + 1).log()
        at_BP = context + 2 * _without_repeats(weight.expand(count, slots), pairs, generator)
        again_BR = _without_repeats(torch.zeros(count, pairs), self.rewrites, generator)
        keys_BN = torch.cat([keys_BP, keys_BP.gather(1, again_BR)], 1)
        answers_BP = values_BN[:, :pairs].scatter(1, again_BR, values_BN[:, pairs:])
        inputs_BT = torch.zeros(count, self.length, dtype=torch.int64)
        inputs_BT[:, :context] = torch.stack([keys_BN, values_BN], 2).flatten(1)
        inputs_BT.scatter_(1, at_BP, keys_BP)
        return Batch(inputs_BT, torch.full_like(inputs_BT, -1).scatter_(1, at_BP, answers_BP))


def _without_repeats(log_weight_BN: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of N indices a row, in the order of weighted draws without replacement (Gumbel top-k)."""
    # For nothing nothing is drawn, so that sequences without rewrites are what they were before there were any.
    if not count:
        return torch.zeros(len(log_weight_BN), 0, dtype=torch.int64)
    uniform_BN = torch.rand(log_weight_BN.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return (log_weight_BN - (-uniform_BN.log()).log()).topk(count, dim=1).indices
