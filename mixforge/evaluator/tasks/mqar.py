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
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.seeds import seed_for
from mixforge.evaluator.task import Batch, HeldOut, Task

_POWER = 0.01
# Eighths of all sequences: the rest is for training.
_EIGHTH: dict[HeldOut, int] = {"selection": 0, "test": 1}
_SCORED_TOKENS = 32_768
# With so many, no eighth of them is empty.
_FEWEST_SEQUENCES = 1_000
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
        if self._sequences() < _FEWEST_SEQUENCES:
            raise ValueError(
                f"vocab {self.vocab}, length {self.length} and pairs {self.pairs} allow {self._sequences()} "
                f"different sequences, too few to split; {_FEWEST_SEQUENCES} or more are needed"
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
        generator = torch.Generator().manual_seed(seed)
        while True:
            drawn = self._draw(self.training.batch * 3 // 2 + 32, generator)
            mine = _eighth(drawn.inputs_BT) >= len(_EIGHTH)
            if int(mine.sum()) >= self.training.batch:
                yield Batch(
                    drawn.inputs_BT[mine][: self.training.batch],
                    drawn.targets_BT[mine][: self.training.batch],
                )

    def held_out(self, split: HeldOut) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed_for(0, "mqar", split))
        size = max(1, _SCORED_TOKENS // self.length)
        left = self.examples
        while left:
            drawn = self._draw(8 * size, generator)
            mine = (_eighth(drawn.inputs_BT) == _EIGHTH[split]).nonzero()[: min(size, left), 0]
            if len(mine):
                left -= len(mine)
                yield Batch(drawn.inputs_BT[mine], drawn.targets_BT[mine])

    def score(self, candidate: Candidate, split: HeldOut, deadline: Deadline) -> float:
        """Fraction of questions whose likeliest next token, over the whole vocabulary, is the value."""
        right = asked = 0
        device = next(candidate.parameters()).device
        for batch in self.held_out(split):
            deadline.check("scoring mqar")
            logits_NX, targets_N = candidate.answer(batch.inputs_BT.to(device), batch.targets_BT.to(device))
            right += int((logits_NX.argmax(1) == targets_N).sum())
            asked += len(targets_N)
        return right / asked

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


class ShiftConv(nn.Module):
    """y_t = x_t + sum_j w_j * x_{t-2+j}: three causal taps for each channel, [B, T, D] -> [B, T, D].

    Every other channel starts with the token before added, so that a pair meets in one vector from the
    first step on.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        taps_DW = torch.zeros(width, 3)
        taps_DW[::2, 1] = 1.0
        self.taps_DW = nn.Parameter(taps_DW)

    def forward(self, x_BTD: Tensor) -> Tensor:
        past_BDT = F.pad(x_BTD.transpose(1, 2), (2, 0))
        return x_BTD + F.conv1d(past_BDT, self.taps_DW[:, None], groups=x_BTD.shape[2]).transpose(1, 2)


def _without_repeats(log_weight_BN: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of N indices a row, in the order of weighted draws without replacement (Gumbel top-k)."""
    uniform_BN = torch.rand(log_weight_BN.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return (log_weight_BN - (-uniform_BN.log()).log()).topk(count, dim=1).indices


def _eighth(tokens_BT: Tensor) -> Tensor:
    """Which eighth of all sequences each row belongs to, 0 to 7, by a hash of its tokens."""
    hash_B = torch.zeros(tokens_BT.shape[0], dtype=torch.int64)
    # Multiply and add modulo 2^64, the high bits last: the constants are those of Knuth's MMIX generator.
    for token_B in tokens_BT.unbind(1):
        hash_B = (hash_B ^ token_B) * 6364136223846793005 + 1442695040888963407
    return (hash_B >> 61) & 7
