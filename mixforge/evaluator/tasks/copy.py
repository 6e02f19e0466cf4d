"""Copying: read a string of random symbols and, after a copy mark, say it again.

    start x1 x2 ... xn mark x1 x2 ... x(n-1)                 target from the mark on: x1 x2 ... xn

Symbols are drawn with repeats. A training string has any number of symbols from `shortest` to `length`, a held-out
one exactly `length`; what follows a shorter one is filled with the start token and never asked. Answers are read
with the true string before them, as in the authors' code, so the score is the fraction of symbols, not of strings.

Source: Jelassi et al. 2024 (arXiv 2402.01032, section 4.1), and the theorem of Ren et al. 2024 (arXiv 2410.03810)
that a state which copies n symbols grows in proportion to n. Departures: one string in a row, not several packed;
no end token; the short convolution of mqar stands in front of the whole stack, for the reason that stands there; a
sequence belongs to one split by a hash of its tokens, so that the splits are disjoint by construction.

`copy_certificate.toml` holds what known architectures reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.scoring import fraction_right
from mixforge.evaluator.shift_conv import ShiftConv
from mixforge.evaluator.splits import FEWEST_SEQUENCES, held_out_batches, training_batches
from mixforge.evaluator.task import Batch, HeldOut, Task

_START, _MARK, _FIRST_SYMBOL = 0, 1, 2
_TRAINING = Recipe(steps=300, batch=32, lr=(3e-3,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy(Task):
    """Fraction of symbols copied right."""

    figure: ClassVar[str] = "copying"

    vocab: int = 32
    """The start token, the copy mark, and the symbols."""
    length: int = 16
    """Symbols in a held-out string, and the most in a training string."""
    shortest: int = 8
    """The fewest symbols in a training string."""
    examples: int = 256
    """Strings in each held-out split."""
    training: Recipe = _TRAINING

    def __post_init__(self) -> None:
        if not 4 <= self.vocab <= 1_048_576:
            raise ValueError(
                f"vocab {self.vocab} is not between 4 and 1048576: two tokens are the start and the mark"
            )
        if not 1 <= self.length <= 1_048_576:
            raise ValueError(f"length {self.length} is not between 1 and 1048576 symbols")
        if not 1 <= self.shortest <= self.length:
            raise ValueError(f"shortest {self.shortest} is not between 1 and {self.length}, the length")
        if not 1 <= self.examples <= 1_048_576:
            raise ValueError(f"examples {self.examples} is not between 1 and 1048576")
        symbols = self.vocab - _FIRST_SYMBOL
        # 2**10 strings are enough, so no longer power needs to be taken.
        if (strings := symbols ** min(self.length, 10)) < FEWEST_SEQUENCES:
            raise ValueError(
                f"vocab {self.vocab} and length {self.length} allow {strings} different strings, too few to split; "
                f"{FEWEST_SEQUENCES} or more are needed"
            )

    def front(self, width: int) -> nn.Module:
        return ShiftConv(width)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        return training_batches(self._draw, self.training.batch, seed)

    def held_out(self, split: HeldOut) -> Iterator[Batch]:
        return held_out_batches(
            self._draw_longest, split, self.examples, task="copy", length=2 * self.length + 1
        )

    def score(self, candidate: Candidate, split: HeldOut, deadline: Deadline) -> float:
        """Fraction of symbols that are the likeliest next token, over the whole vocabulary."""
        return fraction_right(candidate, self.held_out(split), deadline, "scoring copy")

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        sizes_B = torch.randint(self.shortest, self.length + 1, (count,), generator=generator)
        return self._strings(sizes_B, generator)

    def _draw_longest(self, count: int, generator: torch.Generator) -> Batch:
        return self._strings(torch.full((count,), self.length), generator)

    def _strings(self, sizes_B: torch.Tensor, generator: torch.Generator) -> Batch:
        """Strings of those numbers of symbols, as the model reads them."""
        shape = (len(sizes_B), self.length)
        symbols_BN = torch.randint(_FIRST_SYMBOL, self.vocab, shape, generator=generator)
        at_BN = torch.arange(self.length).expand(shape)
        sizes_B1 = sizes_B[:, None]
        is_there_BN = at_BN < sizes_B1
        # What is not there is written to one more column, which is cut off in the end.
        last = 2 * self.length + 1
        inputs_BT = torch.full((len(sizes_B), last + 1), _START)
        targets_BT = torch.full_like(inputs_BT, -1)
        inputs_BT[:, 1 : self.length + 1] = torch.where(is_there_BN, symbols_BN, _START)
        inputs_BT.scatter_(1, sizes_B1 + 1, _MARK)
        again_BN = at_BN + sizes_B1 + 1
        inputs_BT.scatter_(1, torch.where(at_BN < sizes_B1 - 1, again_BN + 1, last), symbols_BN)
        targets_BT.scatter_(1, torch.where(is_there_BN, again_BN, last), symbols_BN)
        return Batch(inputs_BT[:, :last].contiguous(), targets_BT[:, :last].contiguous())
