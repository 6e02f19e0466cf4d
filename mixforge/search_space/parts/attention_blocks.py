"""Attention over a window in blocks, for scores that the fused operation of a window cannot compute.

A sequence of 4 windows or more is cut into blocks as long as the window reaches. The first sees itself; each other one
sees itself and the block before. Blocks are folded into the batch, so that one product computes them all.

Source: Beltagy et al. 2020 (arXiv 2004.05150), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.search_space.parts.attention_pattern import Pattern


@dataclass
class Sight:
    """What the scores of a pass may depend on beside queries and keys.

    query_T, key_S: positions of the queries and of the keys; a key's below 0 says that its slot is empty.
    pattern: which pairs are seen. entries: what is kept of the tokens at `key_S`, by name, [B, H or 1, S, ...].
    present: the same of the queries' tokens. mix: how the queries' tokens mix heads. Keys and values begin with `meta`
    learned ones, which have no position. x_BTD: the layer's inputs at the queries' tokens.
    """

    query_T: Tensor
    key_S: Tensor
    pattern: Pattern
    entries: dict[str, Tensor]
    present: dict[str, Tensor]
    mix: Tensor | None
    meta: int
    x_BTD: Tensor


Run = Callable[[Tensor, Tensor, Tensor, Sight], Tensor]

# Entries that scores read; keys and values come by themselves.
READ = ("forget", "mix")


def in_blocks(run: Run, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
    """run(q, k, v, sight), in blocks where the pattern has them and there is no past."""
    length = q_BHTK.shape[2]
    size = sight.pattern.block(length)
    if size is None or len(sight.key_S) != length:
        return run(q_BHTK, k_BHSK, v_BHSV, sight)
    read = {name: sight.entries[name] for name in READ if name in sight.entries}
    asked = {name: sight.present[name] for name in read}
    first = replace(
        sight,
        query_T=sight.query_T[:size],
        key_S=sight.key_S[:size],
        entries={name: entry[:, :, :size] for name, entry in read.items()},
        present={name: entry[:, :, :size] for name, entry in asked.items()},
        mix=None if sight.mix is None else sight.mix[:, :size],
    )
    end = sight.meta + size
    head_BHTV = run(q_BHTK[:, :, :size], k_BHSK[:, :, :end], v_BHSV[:, :, :end], first)
    # Only distances matter, and they are the same in every block.
    position = torch.arange(2 * size, device=q_BHTK.device)
    rest = replace(
        sight,
        query_T=position[size:],
        key_S=position,
        entries={name: keys_of_blocks(entry, size) for name, entry in read.items()},
        present={name: queries_of_blocks(entry, size) for name, entry in asked.items()},
        mix=None if sight.mix is None else queries_of_blocks(sight.mix[:, None], size)[:, 0],
    )
    k, v = (behind_meta(x_BHSK, sight.meta, size) for x_BHSK in (k_BHSK, v_BHSV))
    folded = run(queries_of_blocks(q_BHTK, size), k, v, rest)
    tail_BHTV = torch.unflatten(folded, 0, (len(q_BHTK), -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([head_BHTV, tail_BHTV[:, :, : length - size]], 2)


def blocks_of(x_BHTK: Tensor, size: int) -> Tensor:
    """[B, H, C, L, K], the last block filled up with zeros."""
    padded = F.pad(x_BHTK, (0, 0, 0, -x_BHTK.shape[2] % size))
    return torch.unflatten(padded, 2, (-1, size))


def queries_of_blocks(x_BHTK: Tensor, size: int) -> Tensor:
    """Every block but the first, [B (C - 1), H, L, K]."""
    return blocks_of(x_BHTK, size)[:, :, 1:].transpose(1, 2).flatten(0, 1)


def keys_of_blocks(x_BHTK: Tensor, size: int) -> Tensor:
    """Every block but the first behind the block before it, [B (C - 1), H, 2 L, K]."""
    blocks = blocks_of(x_BHTK, size)
    return torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], 3).transpose(1, 2).flatten(0, 1)


def behind_meta(x_BHSK: Tensor, meta: int, size: int) -> Tensor:
    """As `keys_of_blocks`, each behind the learned entries."""
    folded = keys_of_blocks(x_BHSK[:, :, meta:], size)
    if not meta:
        return folded
    learned = x_BHSK[:, :, :meta].repeat_interleave(len(folded) // len(x_BHSK), 0)
    return torch.cat([learned, folded], 2)


def block_pairs(length: int, size: int | None, beside: int) -> tuple[int, int]:
    """Queries and query-key pairs that are computed for a sequence without a past, `beside` keys being everywhere."""
    if size is None:
        return length, length * (length + beside)
    blocks = -(-length // size)
    return blocks * size, size * (size + beside) + (blocks - 1) * size * (2 * size + beside)
