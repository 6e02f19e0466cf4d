"""Softmax over a growing set of keys as a scan: o_t = w_t / u_t, the carry of each head being (m, u, w).

    m_t = max(m_{t-1}, z_t)
    u_t = u_{t-1} exp(m_{t-1} - m_t) + exp(z_t - m_t)
    w_t = w_{t-1} exp(m_{t-1} - m_t) + exp(z_t - m_t) v_t

Scores z are [B, H, T], values [B, H, T, V]; m and u are [B, H], w [B, H, V], in float32 or better. Before the first
token they are START, 0 and 0. The `torch` form takes chunks: products with the weights of the pairs inside of a
chunk, and of the pairs of a chunk and the sums of those before it.

Source: Feng et al. 2024 (arXiv 2405.13956), section 3.1 for the carry and section 3.2 for the prefix scan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels.backend import triton_form
from mixforge.kernels.operands import check_alike, check_axes, check_shape

Carry = tuple[Tensor, Tensor, Tensor]

CHUNK = 32
# The largest score so far where there is none; finite, so that differences of two are numbers.
START = -1e30


def softmax_scan_reference(z_BHT: Tensor, v_BHTV: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
    """Token after token. Returns o [B, H, T, V] in the dtype of the values, and the carry after the last one.

    Raises ValueError where a shape, dtype or device does not fit.
    """
    check_scan(z_BHT, v_BHTV, carry)
    z_BHT, wide_BHTV = widened(z_BHT), widened(v_BHTV)
    m, u, w = first_carry(wide_BHTV) if carry is None else carry
    outputs = []
    for t in range(z_BHT.shape[2]):
        m, u, w = advance(z_BHT[:, :, t], wide_BHTV[:, :, t], (m, u, w))
        outputs.append(w / u[..., None])
    return torch.stack(outputs, 2).to(v_BHTV.dtype), (m, u, w)


def softmax_scan_torch(z_BHT: Tensor, v_BHTV: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
    """As `softmax_scan_reference`, in chunks."""
    check_scan(z_BHT, v_BHTV, carry)
    wide = widened(v_BHTV)
    length = z_BHT.shape[2]
    start_BH, u_BH, w_BHV = first_carry(wide) if carry is None else carry
    pad = -length % CHUNK
    # Tokens that fill the last chunk weigh nothing. A last channel of ones sums the weights.
    z_BHCL = torch.unflatten(F.pad(widened(z_BHT), (0, pad), value=-torch.inf), 2, (-1, CHUNK))
    v_BHCLV = torch.unflatten(F.pad(F.pad(wide, (0, 1), value=1.0), (0, 0, 0, pad)), 2, (-1, CHUNK))
    with torch.no_grad():
        top_BHC = z_BHCL.amax(3)
        before_BHC = torch.cat([start_BH[..., None], top_BHC[:, :, :-1]], 2).cummax(2).values
        m_BHCL = torch.maximum(z_BHCL.cummax(3).values, before_BHC[..., None])
    inside = (z_BHCL[..., None, :] - m_BHCL[..., None]).masked_fill(later(CHUNK, wide.device), -torch.inf)
    sums_BHCLV = inside.exp() @ v_BHCLV
    # The carry and the sums of all chunks but the last, each relative to its own largest score.
    each_BHCV = ((z_BHCL - top_BHC[..., None]).exp()[..., None, :] @ v_BHCLV)[..., 0, :]
    carried = torch.cat([w_BHV, u_BH[..., None]], -1)[:, :, None]
    each_BHCV = torch.cat([carried, each_BHCV[:, :, :-1]], 2)
    own_BHC = torch.cat([start_BH[..., None], top_BHC[:, :, :-1]], 2)
    across = own_BHC[..., None, :] - before_BHC[..., None]
    across = across.masked_fill(later(across.shape[3], wide.device), -torch.inf)
    past_BHCV = across.exp() @ each_BHCV
    sums_BHCLV = sums_BHCLV + (before_BHC[..., None] - m_BHCL).exp()[..., None] * past_BHCV[..., None, :]
    sums_BHTV = sums_BHCLV.flatten(2, 3)[:, :, :length]
    w_BHTV, u_BHTV = sums_BHTV[..., :-1], sums_BHTV[..., -1:]
    last = (m_BHCL.flatten(2)[:, :, length - 1], u_BHTV[:, :, -1, 0], w_BHTV[:, :, -1])
    return (w_BHTV / u_BHTV).to(v_BHTV.dtype), last


def softmax_scan_triton(z_BHT: Tensor, v_BHTV: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
    """As `softmax_scan_reference`, by the kernels of `gated_scan`, whose gates are the falls of the running maximum."""
    check_scan(z_BHT, v_BHTV, carry)
    z_BHT, wide = widened(z_BHT), widened(v_BHTV)
    batch, heads, length, dim = v_BHTV.shape
    start_BH, u_BH, w_BHV = first_carry(wide) if carry is None else carry
    # A maximum cancels in w / u, so that it needs no gradient.
    m_BHT = torch.cat([start_BH[..., None], z_BHT.detach()], 2).cummax(2).values
    gate = m_BHT[..., :-1] - m_BHT[..., 1:]
    weight_BHT = (z_BHT - m_BHT[..., 1:]).exp()
    written = weight_BHT[..., None] * F.pad(wide, (0, 1), value=1.0)
    sums, last = triton_form("gated_scan", "gated_scan_triton")(
        gate[..., None].expand(-1, -1, -1, dim + 1).flatten(0, 1),
        written.flatten(0, 1),
        torch.cat([w_BHV, u_BH[..., None]], -1).flatten(0, 1),
    )
    o_BHTV = (sums[..., :-1] / sums[..., -1:]).view(batch, heads, length, dim).to(v_BHTV.dtype)
    last = last.view(batch, heads, dim + 1)
    return o_BHTV, (m_BHT[..., -1], last[..., -1], last[..., :-1])


def softmax_scan_step(z_BH: Tensor, v_BHV: Tensor, carry: Carry) -> Tensor:
    """One token. The carry is brought up to date in place.

    Raises ValueError where a shape, dtype or device does not fit, or there is no carry.
    """
    check_scan(z_BH, v_BHV, carry, is_step=True)
    m, u, w = advance(widened(z_BH), widened(v_BHV), carry)
    for old, new in zip(carry, (m, u, w), strict=True):
        old.copy_(new)
    return (w / u[..., None]).to(v_BHV.dtype)


def advance(z_BH: Tensor, v_BHV: Tensor, carry: Carry) -> Carry:
    """The equations of one token."""
    m_BH, u_BH, w_BHV = carry
    top_BH = torch.maximum(m_BH, z_BH)
    old, new = (m_BH - top_BH).exp(), (z_BH - top_BH).exp()
    return top_BH, u_BH * old + new, w_BHV * old[..., None] + new[..., None] * v_BHV


def first_carry(v_BHTV: Tensor) -> Carry:
    """Before the first token."""
    top_BH = torch.full_like(v_BHTV[:, :, 0, 0], START)
    return top_BH, torch.zeros_like(top_BH), torch.zeros_like(v_BHTV[:, :, 0])


def later(size: int, device: torch.device) -> Tensor:
    """[size, size], True above the diagonal."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def widened(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def check_scan(z: Tensor, v: Tensor, carry: Carry | None, *, is_step: bool = False) -> None:
    """Raise ValueError where a shape, dtype or device does not fit, or a step has no carry."""
    check_axes("z", z, "batch, heads" if is_step else "batch, heads, time")
    check_axes("v", v, "batch, heads, dim" if is_step else "batch, heads, time, dim")
    check_shape("v", v, (*z.shape, "dim"))
    if carry is None and is_step:
        raise ValueError("carry is None; it must be (m, u, w)")
    m, u, w = carry or (None, None, None)
    check_shape("m", m, z.shape[:2])
    check_shape("u", u, z.shape[:2])
    check_shape("w", w, (*z.shape[:2], v.shape[-1]))
    check_alike(z=z, v=v, m=m, u=u, w=w)


def scan_flops(heads: int, length: int, value_dim: int) -> int:
    """Of the torch form, for one sequence: products inside of chunks, of their sums, and across them."""
    chunks = -(-length // CHUNK)
    return 2 * heads * (value_dim + 1) * chunks * (CHUNK * CHUNK + CHUNK + chunks)


FORMS: dict[str, Callable[[Tensor, Tensor, Carry | None], tuple[Tensor, Carry]]] = {
    "reference": softmax_scan_reference,
    "torch": softmax_scan_torch,
    "triton": softmax_scan_triton,
}


def form(backend: str) -> Callable[[Tensor, Tensor, Carry | None], tuple[Tensor, Carry]]:
    """The scan of one backend. Raises ValueError where it is Triton's and Triton is not installed."""
    if backend == "triton":
        triton_form("gated_scan", "gated_scan_triton")
    return FORMS[backend]


def step_form(backend: str) -> Callable[[Tensor, Tensor, Carry], Tensor]:
    """The step of one backend. Raises ValueError where it is Triton's and Triton is not installed."""
    if backend == "triton":
        found: Callable[..., Tensor] = triton_form("softmax_scan_step", "softmax_scan_step_triton")
        return found
    return softmax_scan_step
