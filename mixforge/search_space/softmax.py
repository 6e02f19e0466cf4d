"""Softmax attention over [B, H, T, K] queries, keys and values, by torch's own fused operation.

How many query-key pairs each form computes is said by `attended_pairs`, which is what costs are made of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """Attention over as many or fewer key heads; `mask` is True where a query sees a key."""
    # A tracer hands out sizes as tensors, and the flag must be a plain one.
    grouped = bool(q_BHTK.shape[1] != k_BHTK.shape[1])
    return F.scaled_dot_product_attention(
        q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def causal_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, start: int) -> Tensor:
    """Queries of the tokens from `start` on, over the keys of all tokens."""
    if start == 0:
        return attend(q_BHTK, k_BHTK, v_BHTK, None, causal=True)
    key = torch.arange(k_BHTK.shape[2], device=q_BHTK.device)
    return attend(q_BHTK, k_BHTK, v_BHTK, key <= key[start:, None])


def step_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, positions_T: Tensor) -> Tensor:
    """One query over a cache whose slots are filled up to the query's position, or all of them."""
    slot = torch.arange(k_BHTK.shape[2], device=q_BHTK.device)
    return attend(q_BHTK, k_BHTK, v_BHTK, (slot <= positions_T)[None])


def window_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int) -> Tensor:
    """Queries over the last `window` keys, their own included, of one sequence.

    All pairs with a mask for short sequences; in blocks for those of 4 windows or more.
    """
    length = q_BHTK.shape[2]
    if length <= window:
        return attend(q_BHTK, k_BHTK, v_BHTK, None, causal=True)
    if length < 4 * window:
        return masked_window_attention(q_BHTK, k_BHTK, v_BHTK, window)
    q, k, v = (x_BHTK[:, :, :window] for x_BHTK in (q_BHTK, k_BHTK, v_BHTK))
    first_BHTK = attend(q, k, v, None, causal=True)
    rest_BHTK = blocked_window_attention(q_BHTK, k_BHTK, v_BHTK, window)
    return torch.cat([first_BHTK, rest_BHTK], 2)


def masked_window_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int) -> Tensor:
    """All pairs, those outside the window masked. Keys before the first query's may stand at the left."""
    total = k_BHTK.shape[2]
    key = torch.arange(total, device=q_BHTK.device)
    query = key[total - q_BHTK.shape[2] :, None]
    return attend(q_BHTK, k_BHTK, v_BHTK, (key <= query) & (key > query - window))


def blocked_window_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int) -> Tensor:
    """From the second block of W queries on. Each sees the 2W keys of itself and of the block before."""
    batch, _, length, _ = q_BHTK.shape
    blocks = -(-length // window)
    padded = [F.pad(x_BHTK, (0, 0, 0, blocks * window - length)) for x_BHTK in (q_BHTK, k_BHTK, v_BHTK)]
    # [B, C, H, W, K], and below the blocks folded into the batch.
    q, k, v = (torch.unflatten(x, 2, (blocks, window)).transpose(1, 2) for x in padded)
    k = torch.cat([k[:, :-1], k[:, 1:]], 3).flatten(0, 1)
    v = torch.cat([v[:, :-1], v[:, 1:]], 3).flatten(0, 1)
    key = torch.arange(2 * window, device=q.device)
    query = key[window:, None]
    o = attend(q[:, 1:].flatten(0, 1), k, v, (key <= query) & (key > query - window))
    o_BHTK = torch.unflatten(o, 0, (batch, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return o_BHTK[:, :, : length - window]


def attended_pairs(length: int, window: int | None) -> int:
    """Query-key pairs that a sequence's attention computes without a cache, masked ones included."""
    if window is None or length < 4 * window:
        return length * length
    blocks = -(-length // window)
    return window * window + (blocks - 1) * window * 2 * window
