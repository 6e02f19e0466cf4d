"""Packed sequences: N sequences one after the other on the time axis of a batch of one.

`cu_seqlens` [N+1] holds where each begins, and the length behind the last: 0 < ... < T. A state then has one row
for each sequence.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def check_packed(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raise ValueError where the bounds are none.

    Bounds on an accelerator are taken as they are, for reading them would wait for all work before.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 of shape [N+1], got {cu_seqlens.dtype} of shape "
            f"{list(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens needs a batch of 1, the sequences along its time axis; got a batch of {batch}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {bounds}")


def sequence_edges(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For each token the number of the sequence that it is the first of, or the last of; otherwise -1: int32 [T]."""
    time_T = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # The last bound at or before a token, so that an empty sequence has no token.
    owner_T = torch.searchsorted(cu_seqlens, time_T, right=True) - 1
    first_T = torch.where(cu_seqlens[owner_T] == time_T, owner_T, -1)
    last_T = torch.where(cu_seqlens[owner_T + 1] == time_T + 1, owner_T, -1)
    return first_T.int(), last_T.int()


def edge_tokens(cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the last token of each sequence, and whether it has any: int64, int64 and bool [N].

    One without any, which a GPU does not tell of, has the first of all in their place.
    """
    bounds_N1 = cu_seqlens.long()
    has_any_N = bounds_N1.diff() > 0
    return bounds_N1[:-1] * has_any_N, (bounds_N1[1:] - 1) * has_any_N, has_any_N


def write_untouched(after: Tensor, before: Tensor | None) -> None:
    """The states [N, ...] behind sequences without a token, which no kernel writes: those before them, or zeros."""
    if before is None:
        after.zero_()
    else:
        after.copy_(before)


def chunk_places(cu_seqlens: Tensor, length: int, size: int) -> tuple[Tensor, Tensor, int]:
    """Sequences moved apart to chunks of `size` rows, each to a first row that is left empty.

    Gives the row of each token [T], the chunk that each sequence begins at and the one behind the last [N+1], and how
    many chunks hold them wherever they begin.
    """
    bounds_N1 = cu_seqlens.long()
    edges_N1 = F.pad((bounds_N1.diff() // size + 1).cumsum(0), (1, 0))
    time_T = torch.arange(length, device=cu_seqlens.device)
    owner_T = torch.searchsorted(bounds_N1, time_T, right=True) - 1
    place_T = time_T + 1 + (edges_N1 * size - bounds_N1)[owner_T]
    return place_T, edges_N1, length // size + cu_seqlens.shape[0] - 1
