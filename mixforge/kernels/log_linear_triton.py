"""States for each level of a Fenwick tree on a GPU: one pass of `chunked_linear`'s kernels for each level.

Tokens of a bucket of 2^b are read by those of the next 2^b, which see that state alone. So for bit b a sequence is cut
into pieces of 2^(b+1), each a sequence of its own, of which the first half writes and the second half reads: a token of
the second half writes nothing, but moves the state as it moves any. T tokens have log2(T / 32) passes; what tokens read
of their own chunk of 32 is made as matrix products of torch, as in `log_linear_torch`.

Source: Guo et al. 2025 (arXiv 2506.04761), section 3.4, which has one kernel for a few levels each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixforge.kernels.blocks import ANY
from mixforge.kernels.chunked_linear_triton import check_limits, chunked_linear_triton
from mixforge.kernels.launch import check_device
from mixforge.kernels.log_linear import (
    CHUNK,
    CHUNK_BITS,
    Pairs,
    check_levels,
    crossed,
    held,
    inside,
    joined,
    left,
    opened,
    passed,
    together,
)


def log_linear_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTGV: Tensor,
    decay: Tensor | None,
    beta_BTG: Tensor | None,
    state_BGNKV: Tensor | None,
    weight_BTGE: Tensor,
    start: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """As `log_linear_reference`, on a GPU.

    Raises ValueError where a shape, dtype or device does not fit.
    """
    check_levels(q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, state_BGNKV, weight_BTGE)
    state = state_BGNKV
    check_device(q=q_BTHK, k=k_BTHK, v=v_BTGV, decay=decay, beta=beta_BTG, state=state, weight=weight_BTGE)
    check_limits(q_BTHK, ANY)
    batch, length = v_BTGV.shape[:2]
    inner, pairs = inside(q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG, weight_BTGE, start)
    after = None
    if state_BGNKV is not None:
        inner, buckets = of_edges(inner, pairs, state_BGNKV, start, start + length)
        after = held(buckets, torch.zeros_like(state_BGNKV))
    o_BTGV = joined(inner, batch, start, length)
    end, given = start + length, (q_BTHK, k_BTHK, v_BTGV, decay, beta_BTG)
    at = torch.arange(start, end, device=v_BTGV.device)
    for bit in range(CHUNK_BITS, end.bit_length()):
        reads_T11 = ((at >> bit) & 1).to(torch.bool)[:, None, None]
        level = min(bit + 1, weight_BTGE.shape[3] - 1)
        share = (weight_BTGE[..., level, None] * reads_T11).to(o_BTGV.dtype)
        size = 2 << bit
        head = min(length, -start % size)
        whole = head + (length - head) // size * size
        is_left = after is not None and bool(end >> bit & 1)
        outputs = []
        for first, last in ((0, head), (head, whole), (whole, length)):
            if first == last:
                continue
            before = _before(state_BGNKV, start, bit) if first == 0 and start % size else None
            is_last = is_left and last == length
            if (start + last - 1) >> bit & 1 or is_last:
                o, final = piece(given, reads_T11, first, last, size, before)
                if is_last and after is not None:
                    after[:, :, bit] = final
            else:
                o = torch.zeros_like(v_BTGV[:, first:last])
            outputs.append(o)
        o_BTGV = o_BTGV + share * torch.cat(outputs, 1)
    return o_BTGV.to(v_BTGV.dtype), after


def of_edges(
    inner: Tensor, pairs: Pairs, state_BGNKV: Tensor, start: int, end: int
) -> tuple[Tensor, dict[int, Tensor]]:
    """`inner` with what the first chunk reads of buckets smaller than a chunk, and those that are open at the end."""
    passing, small = passed(pairs), opened(state_BGNKV[:, :, :CHUNK_BITS], start)
    if small:
        seen, small = crossed(passing, 0, small, pairs.weight[0], start)
        inner = torch.cat([inner[:1] + seen, inner[1:]])
    written = left(pairs, passing.leaving[-1], end)
    # Behind their chunk they are parts of larger ones.
    is_within = start // CHUNK == end // CHUNK
    return inner, together(small, start, written, end) if is_within else written


def piece(
    given: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    reads_T11: Tensor,
    first: int,
    last: int,
    size: int,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tokens from first to last, cut into sequences of `size` where there are several: what they read, the last state."""
    q, k, v, decay, beta = given
    v = v.masked_fill(reads_T11, 0)
    rows = min(size, last - first)

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.unflatten(x[:, first:last], 1, (-1, rows)).flatten(0, 1)

    log = decay if decay is None or decay.dim() == 1 else cut(decay)
    o, final = chunked_linear_triton(cut(q), cut(k), cut(v), log, cut(beta), before)  # type: ignore[arg-type]
    return torch.unflatten(o, 0, (v.shape[0], -1)).flatten(1, 2), final


def _before(state_BGNKV: Tensor | None, start: int, bit: int) -> Tensor | None:
    """What a piece that has begun before `start` has written so far: one bucket, or those below it together."""
    if state_BGNKV is None:
        return None
    if start >> bit & 1:
        return state_BGNKV[:, :, bit]
    return sum(state_BGNKV[:, :, low] for low in range(bit) if start >> low & 1)  # type: ignore[return-value]
