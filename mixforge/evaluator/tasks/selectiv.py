"""SelectivBench: read letters of an artificial grammar with gaps between them, and say its hidden state at each step.

    inputs  a _ _ c _ a _ _ ...          targets  a1 a1 a1 c4 c4 a3 a3 a3 ...

An ambiguous letter stands for several states, its copies, so that which one is meant follows from the letters before.
From each state each letter leads to one of its copies, drawn at random, if it may follow at all, which it may with
probability min(1, 0.4 copies); what may follow is equally likely. The end is a letter and a state of its own; after it,
and at the beginning, comes one of four states. A grammar from which some state cannot reach the end is drawn again.

A letter is followed by blanks: in training `fewest_blanks` to `most_blanks`, in held-out sequences `held_out_blanks`.
From letter number `intruders_from` on, one that may not follow, where there is such, stands in between with probability
`intruders`; the state stays, and is what is asked for there. Every step is asked for. The score is the fraction of
letters, intruders too, whose state has the largest sum of probabilities over the letter and its blanks; of a model that
reads a prefix together, over those of its steps that count.

Source: SelectivBench ("Dissecting Linear Recurrent Models"), its public code: alphabets, density, starts, gaps, loss and
score. Its tasks, each with 200 symbols and, but for the first, with letters = ambiguous = copies = 40:

    1 complexity        letters = ambiguous = copies = 20 to 40, one blank
    2 gaps              1 to 10 blanks, held out 10
    3 intruders         one blank, intruders = 0.1, intruders_from = 50
    4 generalisation    1 to 10 blanks, held out 10, 20, 50 and 100

Departures: inputs are tokens and not vectors, and the uniform noise that tasks 2 and 4 add to these is left out. Letters
and states have tokens of their own, as a model's embeddings may be tied. That an intruder leaves the state as it is, and
takes the place of one of the symbols, is ours. There a test sequence is drawn from the seed of a training sequence; here
a sequence belongs to one split by a hash of its letters, whatever its blanks, so that the splits are disjoint by
construction, and the grammar's seed is none of the training's.

`selectiv_certificate.toml` holds what known architectures reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from mixforge.evaluator.candidate import Candidate, asked
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.seeds import seed_for
from mixforge.evaluator.splits import FEWEST_SEQUENCES, SCORED_TOKENS, held_out_batches, training_batches
from mixforge.evaluator.task import Batch, HeldOut, Task

_DENSITY = 0.4
_STARTS = 4
_MOST_DRAWS = 1_000
# A grammar is a table of states by letters, with each entry a number of Python's: so many take seconds, once.
_MOST_ENTRIES = 4_194_304
_TRAINING = Recipe(steps=300, batch=32, lr=(3e-3,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selectiv(Task):
    """Fraction of letters whose hidden state is named right."""

    figure: ClassVar[str] = "selectivity"

    letters: int = 4
    """In the alphabet, beside the end."""
    ambiguous: int = 4
    """Letters with several states."""
    copies: int = 4
    """States of an ambiguous letter."""
    symbols: int = 32
    """Letters in a sequence, ends and intruders among them."""
    fewest_blanks: int = 1
    most_blanks: int = 1
    """After each letter in training."""
    held_out_blanks: int = 1
    """After each letter of a held-out sequence."""
    intruders: float = 0.0
    """Probability of a letter that cannot follow."""
    intruders_from: int = 8
    """Letters before the first that may be one."""
    grammar: int = 1
    """Its seed."""
    examples: int = 256
    """Sequences in each held-out split."""
    training: Recipe = _TRAINING

    def __post_init__(self) -> None:
        if not 1 <= self.letters <= 1_024:
            raise ValueError(f"letters {self.letters} is not between 1 and 1024")
        if not 0 <= self.ambiguous <= self.letters:
            raise ValueError(f"ambiguous {self.ambiguous} is not between 0 and {self.letters}, the letters")
        if not 1 <= self.copies <= 1_024:
            raise ValueError(f"copies {self.copies} is not between 1 and 1024 states of a letter")
        if (entries := self.states * (self.letters + 1)) > _MOST_ENTRIES:
            raise ValueError(
                f"letters {self.letters}, ambiguous {self.ambiguous} and copies {self.copies} make {self.states} states, "
                f"and {entries} pairs of a state and a letter; at most {_MOST_ENTRIES} are drawn: give fewer of either"
            )
        if not 10 <= self.symbols <= 65_536:
            raise ValueError(f"symbols {self.symbols} is not between 10 and 65536 letters in a sequence")
        if not 0 <= self.fewest_blanks <= self.most_blanks <= 4_096:
            raise ValueError(
                f"fewest_blanks {self.fewest_blanks} and most_blanks {self.most_blanks} are not two numbers from 0 to "
                "4096, the smaller first"
            )
        if not 0 <= self.held_out_blanks <= 4_096:
            raise ValueError(f"held_out_blanks {self.held_out_blanks} is not between 0 and 4096")
        if not 0 <= self.intruders < 1:
            raise ValueError(f"intruders {self.intruders:g} is not a probability from 0 to below 1")
        if not 1 <= self.intruders_from < self.symbols:
            raise ValueError(
                f"intruders_from {self.intruders_from} is not between 1 and {self.symbols - 1}, one below symbols"
            )
        if not 0 <= self.grammar < 2**63:
            raise ValueError(f"grammar {self.grammar} is not a seed between 0 and 2**63 - 1")
        if not 1 <= self.examples <= 1_048_576:
            raise ValueError(f"examples {self.examples} is not between 1 and 1048576")
        if (sequences := self._rules().beginnings(FEWEST_SEQUENCES)) < FEWEST_SEQUENCES:
            raise ValueError(
                f"grammar {self.grammar} of {self.letters} letters allows {sequences} different beginnings of ten "
                f"letters, too few to split; {FEWEST_SEQUENCES} or more are needed: give another grammar or more letters"
            )

    @property
    def states(self) -> int:
        """Hidden states, the end among them: the classes that are asked for."""
        return self.ambiguous * self.copies + self.letters - self.ambiguous + 1

    @property
    def vocab(self) -> int:
        # States, letters, the end as it is read, and the blank.
        return self.states + self.letters + 2

    @property
    def blank(self) -> int:
        """The token of a step without a letter."""
        return self.vocab - 1

    def train_batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed_for(seed, self.name, "blanks"))
        for drawn in training_batches(self._draw, self.training.batch, seed):
            shape = drawn.inputs_BT.shape
            blanks_BN = torch.randint(self.fewest_blanks, self.most_blanks + 1, shape, generator=generator)
            yield self._spread(drawn, blanks_BN)

    def held_out(self, split: HeldOut) -> Iterator[Batch]:
        # A score takes as many probabilities as there are steps and tokens.
        size = max(
            1, SCORED_TOKENS // (self.symbols * (1 + self.held_out_blanks) * max(1, self.vocab // 256))
        )
        # The same letters whatever the blanks.
        for drawn in held_out_batches(self._draw, split, self.examples, task=self.name, length=self.symbols):
            for letters_BN, states_BN in zip(
                torch.split(drawn.inputs_BT, size), torch.split(drawn.targets_BT, size), strict=True
            ):
                blanks_BN = torch.full_like(letters_BN, self.held_out_blanks)
                yield self._spread(Batch(letters_BN, states_BN), blanks_BN)

    def score(self, candidate: Candidate, split: HeldOut, deadline: Deadline) -> float:
        """Fraction of letters whose state has the largest summed probability, over the whole vocabulary."""
        device = next(candidate.parameters()).device
        right = letters = 0
        for batch in self.held_out(split):
            deadline.check(f"scoring {self.name}")
            there = batch.to(str(device))
            logits_NX, targets_N = candidate.answer(there.inputs_BT, there.targets_BT)
            prefix = candidate.model.prefix
            begins_BT = there.inputs_BT != self.blank
            # A letter that a prefix begins is named by its blanks behind that alone.
            begins_BT[:, max(0, prefix - 1)] = True
            begins_N = begins_BT[asked(there.targets_BT, prefix)]
            states_M = targets_N[begins_N]
            sums_MX = logits_NX.new_zeros(len(states_M), logits_NX.shape[1], dtype=torch.float32)
            sums_MX.index_add_(0, begins_N.cumsum(0) - 1, logits_NX.float().softmax(1))
            right += int((sums_MX.argmax(1) == states_M).sum())
            letters += len(states_M)
        return right / letters

    def _rules(self) -> Grammar:
        return draw_grammar(self.letters, self.ambiguous, self.copies, self.grammar)

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        """Letters without blanks, as tokens, and their states."""
        rules = self._rules()
        last = rules.end.expand(count)
        letters, states = [], []
        for at in range(self.symbols):
            chance_B, pick_B = torch.rand(2, count, generator=generator, dtype=torch.float64)
            state_B = rules.follow(last, pick_B)
            letter_B = rules.letter_S[state_B]
            if self.intruders > 0 and at >= self.intruders_from:
                stranger_B = rules.stranger(last, pick_B)
                intrudes_B = (chance_B < self.intruders) & (stranger_B >= 0)
                state_B = torch.where(intrudes_B, last, state_B)
                letter_B = torch.where(intrudes_B, stranger_B, letter_B)
            letters.append(self.states + letter_B)
            states.append(state_B)
            last = state_B
        return Batch(torch.stack(letters, 1), torch.stack(states, 1))

    def _spread(self, drawn: Batch, blanks_BN: Tensor) -> Batch:
        """With blanks behind each letter; rows that are shorter than others end in steps that are not asked for."""
        ends_BN = (1 + blanks_BN).cumsum(1)
        length = int(ends_BN[:, -1].max())
        begins_BN = ends_BN - 1 - blanks_BN
        inputs_BT = torch.full((len(blanks_BN), length), self.blank)
        inputs_BT.scatter_(1, begins_BN, drawn.inputs_BT)
        which_BT = (inputs_BT != self.blank).cumsum(1) - 1
        targets_BT = drawn.targets_BT.gather(1, which_BT)
        targets_BT[torch.arange(length) >= ends_BN[:, -1:]] = -1
        return Batch(inputs_BT, targets_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """Which states may follow which, each as likely as the others. Letters are counted from 0; the end is the last.

    letter_S: the letter of each state. next_SE: the states that may follow, -1 behind the last. count_S: how many.
    strange_SE, strangers_S: the letters that may not follow, likewise.
    """

    letter_S: Tensor
    next_SE: Tensor
    count_S: Tensor
    strange_SE: Tensor
    strangers_S: Tensor

    @property
    def end(self) -> Tensor:
        """The state before the first letter, which is the end of what was before."""
        return torch.tensor(len(self.letter_S) - 1)

    def follow(self, state_B: Tensor, chance_B: Tensor) -> Tensor:
        """The state after each, by numbers from 0 to below 1."""
        place_B = (chance_B * self.count_S[state_B]).long()
        return self.next_SE[state_B, place_B]

    def stranger(self, state_B: Tensor, chance_B: Tensor) -> Tensor:
        """A letter that may not follow each; -1 where every letter may."""
        place_B = (chance_B * self.strangers_S[state_B]).long()
        return self.strange_SE[state_B, place_B]

    def beginnings(self, enough: int) -> int:
        """How many sequences of ten letters there are; of fewer letters where there are `enough` of those."""
        letters = self.letter_S.tolist()
        # Sequences by the states that they may have led to: one letter leads from a state to one, but at the beginning.
        ways = {frozenset([len(letters) - 1]): 1}
        for _ in range(10):
            longer: Counter[frozenset[int]] = Counter()
            for states, count in ways.items():
                by_letter: dict[int, set[int]] = {}
                for state in states:
                    for after in self.next_SE[state, : self.count_S[state]].tolist():
                        by_letter.setdefault(letters[after], set()).add(after)
                for group in by_letter.values():
                    longer[frozenset(group)] += count
            ways = longer
            if sum(ways.values()) >= enough:
                break
        return sum(ways.values())


@lru_cache(maxsize=64)
def draw_grammar(letters: int, ambiguous: int, copies: int, seed: int) -> Grammar:
    """The first grammar of a seed whose states all reach the end. Raises ValueError where none is found."""
    generator = torch.Generator().manual_seed(seed_for(seed, "selectiv", "grammar"))
    copies_L = torch.tensor([copies] * ambiguous + [1] * (letters - ambiguous + 1))
    letter_S = torch.arange(letters + 1).repeat_interleave(copies_L)
    first_L = copies_L.cumsum(0) - copies_L
    end = len(letter_S) - 1
    for _ in range(_MOST_DRAWS):
        pick_SL, chance_SL = torch.rand(2, end + 1, letters + 1, generator=generator, dtype=torch.float64)
        target_SL = first_L + (pick_SL * copies_L).long()
        there_SL = chance_SL < (_DENSITY * copies_L).clamp(max=1)
        starts = torch.randperm(end, generator=generator)[:_STARTS]
        rows = [row[there].tolist() for row, there in zip(target_SL[:-1], there_SL[:-1], strict=True)]
        rows.append(starts.tolist())
        next_SE = _padded(rows)
        if _all_reach(next_SE, end):
            follows = [set(letter_S[row].tolist()) for row in rows]
            strange = [[letter for letter in range(letters + 1) if letter not in row] for row in follows]
            return Grammar(
                letter_S=letter_S,
                next_SE=next_SE,
                count_S=torch.tensor([len(row) for row in rows]),
                strange_SE=_padded(strange),
                strangers_S=torch.tensor([len(row) for row in strange]),
            )
    raise ValueError(
        f"no grammar of {letters} letters, {ambiguous} of them with {copies} states, whose states all reach the end was "
        f"found in {_MOST_DRAWS} draws; give more letters"
    )


def _padded(rows: list[list[int]]) -> Tensor:
    """Rows of different lengths as one table, at least one column wide, -1 where there is nothing."""
    wide = max(1, *map(len, rows))
    return torch.tensor([row + [-1] * (wide - len(row)) for row in rows])


def _all_reach(next_SE: Tensor, end: int) -> bool:
    """Whether every state leads to the end."""
    reaches_S = torch.zeros(end + 2, dtype=torch.bool)
    reaches_S[end] = True
    while True:
        # The last place stands for no state: it is where -1 points to.
        wider_S = reaches_S[:-1] | reaches_S[next_SE].any(1)
        if torch.equal(wider_S, reaches_S[:-1]):
            return bool(wider_S.all())
        reaches_S[:-1] = wider_S
