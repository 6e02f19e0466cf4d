"""Drawn sequences, each in exactly one split by a hash of its tokens: the splits are disjoint by construction.

One eighth of all sequences is for selection, one for testing, the rest for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mixforge.evaluator.seeds import seed_for
from mixforge.evaluator.task import Batch, HeldOut

Draw = Callable[[int, torch.Generator], Batch]
"""So many sequences, drawn from a generator."""

FEWEST_SEQUENCES = 1_000
"""With so many different ones, no eighth of them is empty."""

_EIGHTH: dict[HeldOut, int] = {"selection": 0, "test": 1}
SCORED_TOKENS = 32_768
"""The most that are scored at once."""


def training_batches(draw: Draw, batch: int, seed: int) -> Iterator[Batch]:
    """Batches of `batch` sequences of the training split, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = draw(batch * 3 // 2 + 32, generator)
        mine = eighth(drawn.inputs_BT) >= len(_EIGHTH)
        if int(mine.sum()) >= batch:
            yield Batch(drawn.inputs_BT[mine][:batch], drawn.targets_BT[mine][:batch])


def held_out_batches(
    draw: Draw, split: HeldOut, examples: int, *, task: str, length: int, prefix: int | None = None
) -> Iterator[Batch]:
    """`examples` sequences of `length` tokens of a held-out split, the same ones at every call.

    task: whose they are, so that no two tasks share random numbers. prefix: how many tokens decide where a
    sequence belongs, where that is not all of them.
    """
    generator = torch.Generator().manual_seed(seed_for(0, task, split))
    size = max(1, SCORED_TOKENS // length)
    left = examples
    while left:
        drawn = draw(8 * size, generator)
        mine = (eighth(drawn.inputs_BT[:, :prefix]) == _EIGHTH[split]).nonzero()[: min(size, left), 0]
        if len(mine):
            left -= len(mine)
            yield Batch(drawn.inputs_BT[mine], drawn.targets_BT[mine])


def eighth(tokens_BT: Tensor) -> Tensor:
    """Which eighth of all sequences each row belongs to, 0 to 7, by a hash of its tokens."""
    hash_B = torch.zeros(tokens_BT.shape[0], dtype=torch.int64)
    # Multiply and add modulo 2^64, the high bits last: the constants are those of Knuth's MMIX generator.
    for token_B in tokens_BT.unbind(1):
        hash_B = (hash_B ^ token_B) * 6364136223846793005 + 1442695040888963407
    return (hash_B >> 61) & 7
