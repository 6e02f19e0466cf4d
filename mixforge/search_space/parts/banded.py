"""A fixed mixing matrix over the last W tokens, which repeats itself every W tokens.

    y_t = sum_{t-W < s <= t} M[t mod W, s mod W] v_s

A block of W tokens reads itself through the matrix's lower triangle and the block before it through the rest. In the
first block there is nothing before it: a matrix of its own, as a softmax over fewer tokens needs, takes its place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def banded_flops(length: int, window: int) -> int:
    """Matmul FLOPs of `mix_banded` for each channel, from the first token on."""
    if length <= window:
        return 2 * length * length
    return 2 * window * window * (2 * -(-length // window) - 1)


def mix_banded(
    first_HWW: Tensor, later_HWW: Tensor, v_BHTV: Tensor, ring_BHWV: Tensor | None, start: int
) -> Tensor:
    """[B, H, T, V], `start` tokens after the first; `ring` has token s before them in slot s mod W.

    Only the lower triangle of `first` is read.
    """
    window, length = first_HWW.shape[1], v_BHTV.shape[2]
    end = start + length
    if end <= window:
        seen = v_BHTV if ring_BHWV is None else torch.cat([ring_BHWV[:, :, :start], v_BHTV], 2)
        return _mix(first_HWW[:, start:end, :end].tril(start), seen[:, :, None])[:, :, 0]
    # Whole blocks from the start of the one that the first token is in.
    lead = start % window
    batch, heads, _, dim = v_BHTV.shape
    before = v_BHTV.new_zeros(batch, heads, window, dim) if ring_BHWV is None else ring_BHWV
    blocks = -(-(lead + length) // window)
    own = torch.cat([before[:, :, :lead], v_BHTV], 2)
    own = F.pad(own, (0, 0, 0, blocks * window - lead - length)).view(batch, heads, blocks, window, dim)
    if start < window:
        y = torch.cat(
            [
                _mix(first_HWW.tril(), own[:, :, :1]),
                _mix(later_HWW.tril(), own[:, :, 1:]) + _mix(later_HWW.triu(1), own[:, :, :-1]),
            ],
            2,
        )
    else:
        # Slots before `lead` are of this block already; its tokens from `lead` on do not look there.
        previous = torch.cat([before[:, :, None], own[:, :, :-1]], 2)
        y = _mix(later_HWW.tril(), own) + _mix(later_HWW.triu(1), previous)
    return y.flatten(2, 3)[:, :, lead : lead + length]


def _mix(matrix_HQW: Tensor, v_BHCWV: Tensor) -> Tensor:
    batch, heads, blocks, window, dim = v_BHCWV.shape
    # One product for each head, all sequences and blocks side by side.
    v_HWN = v_BHCWV.permute(1, 3, 0, 2, 4).reshape(heads, window, -1)
    y_HQN = torch.bmm(matrix_HQW, v_HWN)
    return y_HQN.view(heads, -1, batch, blocks, dim).permute(2, 0, 3, 1, 4)
