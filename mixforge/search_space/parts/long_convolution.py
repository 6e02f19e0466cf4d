"""Causal convolution with a filter as long as the sequence, by the fast Fourier transform.

    y_t = sum_{s < W} h[s] u_{t-s}

Source: Fu et al. 2022 (arXiv 2212.14052), section 4.1, for the transform at twice the length, which wraps nothing round.
"""

from __future__ import annotations

import torch
from torch import Tensor


def long_convolve(filter_DW: Tensor, u_BDT: Tensor, past: int) -> Tensor:
    """[B, D, past + T] -> [B, D, T], by channels; the first `past` inputs are those before the first output.

    The filter may have a batch. Computed in float32 or better, returned in the dtype of u.
    """
    exact = torch.float64 if u_BDT.dtype == torch.float64 else torch.float32
    size = _fast_size(u_BDT.shape[-1] + filter_DW.shape[-1] - 1)
    spectrum = torch.fft.rfft(u_BDT.to(exact), n=size) * torch.fft.rfft(filter_DW.to(exact), n=size)
    y_BDT: Tensor = torch.fft.irfft(spectrum, n=size)[..., past : u_BDT.shape[-1]]
    return y_BDT.to(u_BDT.dtype)


def correlate(q_BDT: Tensor, k_BDT: Tensor, past: int) -> Tensor:
    """c[s] = sum_j q_j k_{j-s} for s from 0 to `past`: [B, D, T], [B, D, past + T] -> [B, D, past + 1].

    In float32 or better.
    """
    exact = torch.float64 if q_BDT.dtype == torch.float64 else torch.float32
    size = _fast_size(k_BDT.shape[-1])
    spectrum = torch.fft.rfft(q_BDT.to(exact), n=size).conj() * torch.fft.rfft(k_BDT.to(exact), n=size)
    c: Tensor = torch.fft.irfft(spectrum, n=size)[..., : past + 1].flip(-1)
    return c


def _fast_size(least: int) -> int:
    """The smallest 2^n or 3 2^n that is no smaller: sizes with other factors are slow."""
    power = 1 << (least - 1).bit_length()
    return 3 * power // 4 if power >= 4 and 3 * power // 4 >= least else power


def ring_in_order(ring_BDW: Tensor, start: int, count: int) -> Tensor:
    """The last `count` entries before token `start`, oldest first, of a ring with token t in slot t mod W."""
    slots = torch.arange(start - count, start, device=ring_BDW.device) % ring_BDW.shape[-1]
    return ring_BDW[..., slots]


def write_ring(ring_BDW: Tensor, u_BDT: Tensor, positions_T: Tensor) -> None:
    """Write the last of new entries into their slots."""
    slots = ring_BDW.shape[-1]
    kept = min(slots, u_BDT.shape[-1])
    ring_BDW.index_copy_(-1, positions_T[-kept:] % slots, u_BDT[..., -kept:])


def ages(ring_BDW: Tensor, position: Tensor) -> Tensor:
    """How many tokens ago each slot was written, when `position` [1] is the newest: [W]."""
    slots = ring_BDW.shape[-1]
    return (position - torch.arange(slots, device=ring_BDW.device)) % slots
