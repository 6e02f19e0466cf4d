"""The scan of a diagonal state space that does not depend on the input: P numbers for each channel d.

    h_t[d, p] = a[d, p] h_{t-1}[d, p] + x_t[d],    a = e^(rate + i frequency), rate <= 0
    y_t[d] = Re sum_p c[d, p] h_t[d, p]

What the input is scaled by is the same at every time and belongs into c. Complex numbers are pairs of real planes: with
frequencies, c_DPN and the state are [.., P, 2], real and imaginary; without, [.., P, 1], and all is real.

In the torch form the outputs are a convolution of x with y's kernel K_l[d] = Re sum_p c a^l, by the fast Fourier
transform, plus what the state before adds, Re c a^(t+1) h; the state after is a^T h + sum_t a^(T-1-t) x_t. The kernel
and both sums are matrix products with the powers of a. The triton form is the elementwise scan over all D P numbers.

Source: Gu et al. 2022 (arXiv 2206.11893, section 3.3): the kernel as a product with a Vandermonde matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mixforge.kernels import gated_scan, gated_scan_complex
from mixforge.kernels.backend import triton_form
from mixforge.kernels.operands import check_alike, check_axes, check_log, check_shape


def diagonal_ssm_reference(
    x_BTD: Tensor,
    rate_DP: Tensor,
    frequency_DP: Tensor | None,
    c_DPN: Tensor,
    state_BDPN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One token after the other. Returns (y_BTD in the dtype of x, the state after, or None where none was given).

    States are float32, or float64 where x is. Raises ValueError where a shape, dtype or device does not fit or,
    on a CPU, a rate is above 0.
    """
    check_diagonal(x_BTD, rate_DP, frequency_DP, c_DPN, state_BDPN)
    dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    first = x_BTD.new_zeros(x_BTD.shape[0], *c_DPN.shape, dtype=dtype)
    state = first if state_BDPN is None else state_BDPN.to(dtype)
    outputs = []
    for x_BD in x_BTD.to(dtype).unbind(1):
        state = advanced(x_BD, rate_DP, frequency_DP, state)
        outputs.append(read_out(c_DPN, state))
    return torch.stack(outputs, 1).to(x_BTD.dtype), None if state_BDPN is None else state


def diagonal_ssm_torch(
    x_BTD: Tensor,
    rate_DP: Tensor,
    frequency_DP: Tensor | None,
    c_DPN: Tensor,
    state_BDPN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `diagonal_ssm_reference`, by the fast Fourier transform: 2 D P N matmul FLOPs a token without a state."""
    check_diagonal(x_BTD, rate_DP, frequency_DP, c_DPN, state_BDPN)
    dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    x_DTB, c = x_BTD.to(dtype).permute(2, 1, 0), c_DPN.to(dtype)
    length = x_BTD.shape[1]
    planes = powers(rate_DP.to(dtype), None if frequency_DP is None else frequency_DP.to(dtype), length)
    # The real part of a product is that of the real planes less that of the imaginary ones.
    signed = conjugate(c)
    kernel_D1T = sum_of(torch.bmm(c_DP[:, None], a_DPT) for c_DP, a_DPT in pairs(signed, planes))
    size = 2 * length
    spectrum = torch.fft.rfft(kernel_D1T.transpose(1, 2), n=size, dim=1) * torch.fft.rfft(
        x_DTB, n=size, dim=1
    )
    y_DTB = torch.fft.irfft(spectrum, n=size, dim=1)[:, :length]
    if state_BDPN is None:
        return y_DTB.permute(2, 1, 0).to(x_BTD.dtype), None
    # What the state before the first token is by the time of each token: one more power than of its own input.
    turned_BDPN = turned(state_BDPN.to(dtype), rate_DP, frequency_DP)
    carried = conjugate(product_of(c[None], turned_BDPN))
    y_DTB = y_DTB + sum_of(
        torch.bmm(a_DPT.transpose(1, 2), h_BDP.permute(1, 2, 0)) for h_BDP, a_DPT in pairs(carried, planes)
    )
    written = torch.stack([torch.bmm(a_DPT.flip(2), x_DTB).permute(2, 0, 1) for a_DPT in planes], -1)
    last_DPN = torch.stack([a_DPT[:, :, -1] for a_DPT in planes], -1)
    after = written + product_of(last_DPN[None], turned_BDPN)
    return y_DTB.permute(2, 1, 0).to(x_BTD.dtype), after


def diagonal_ssm_triton(
    x_BTD: Tensor,
    rate_DP: Tensor,
    frequency_DP: Tensor | None,
    c_DPN: Tensor,
    state_BDPN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `diagonal_ssm_reference`, by the Triton kernels of the elementwise scans."""
    check_diagonal(x_BTD, rate_DP, frequency_DP, c_DPN, state_BDPN)
    batch, length, _ = x_BTD.shape
    dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    shape = (batch, length, rate_DP.numel())
    rate = rate_DP.to(dtype).flatten().expand(shape)
    x = x_BTD.to(dtype).repeat_interleave(rate_DP.shape[1], 2)
    if frequency_DP is None:
        first = None if state_BDPN is None else state_BDPN[..., 0].flatten(1)
        h, after = gated_scan.form("triton")(rate, x, first)
        h_BTDPN = torch.unflatten(h, 2, rate_DP.shape)[..., None]
        after = torch.unflatten(after, 1, rate_DP.shape)[..., None]
    else:
        phase = frequency_DP.to(dtype).flatten().expand(shape)
        first = None if state_BDPN is None else state_BDPN.flatten(1, 2).transpose(1, 2)
        h, after = gated_scan_complex.form("triton")(
            rate, phase, torch.stack([x, torch.zeros_like(x)], 2), first
        )
        h_BTDPN = torch.unflatten(h.transpose(2, 3), 2, rate_DP.shape)
        after = torch.unflatten(after.transpose(1, 2).contiguous(), 1, rate_DP.shape)
    return read_out(c_DPN, h_BTDPN).to(x_BTD.dtype), None if state_BDPN is None else after


def diagonal_ssm_step(
    x_BD: Tensor, rate_DP: Tensor, frequency_DP: Tensor | None, c_DPN: Tensor, state_BDPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (y_BD in the dtype of x, state_BDPN). Where gradients are off, the state is updated in place.

    Raises ValueError where a shape, dtype or device does not fit, or there is no state.
    """
    check_diagonal(x_BD, rate_DP, frequency_DP, c_DPN, state_BDPN, is_step=True)
    state = advanced(x_BD.to(state_BDPN.dtype), rate_DP, frequency_DP, state_BDPN)
    y_BD = read_out(c_DPN, state).to(x_BD.dtype)
    return y_BD, state if torch.is_grad_enabled() else state_BDPN.copy_(state)


def powers(rate_DP: Tensor, frequency_DP: Tensor | None, length: int) -> list[Tensor]:
    """a^l [D, P, T] for l = 0 .. T-1: its real plane, and its imaginary one where there is one."""
    exponent_T = torch.arange(length, device=rate_DP.device, dtype=rate_DP.dtype)
    magnitude_DPT = torch.exp(rate_DP[..., None] * exponent_T)
    if frequency_DP is None:
        return [magnitude_DPT]
    # Thousands of turns would cost a float32 its digits: whole turns are taken off in float64.
    angle_DPT = torch.remainder(frequency_DP.double()[..., None] * exponent_T.double(), 2 * math.pi)
    angle_DPT = angle_DPT.to(rate_DP.dtype)
    return [magnitude_DPT * angle_DPT.cos(), magnitude_DPT * angle_DPT.sin()]


def pairs(numbers: Tensor, planes: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The planes of numbers, which are their last axis, with those of the powers."""
    return zip(numbers.unbind(-1), planes, strict=True)


def sum_of(terms: Iterator[Tensor]) -> Tensor:
    """The sum of one or two tensors."""
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def turned(state: Tensor, rate_DP: Tensor, frequency_DP: Tensor | None) -> Tensor:
    """a h [..., D, P, N]."""
    magnitude = rate_DP.to(state.dtype).exp()
    if frequency_DP is None:
        return magnitude[..., None] * state
    frequency = frequency_DP.to(state.dtype)
    planes = torch.stack([magnitude * frequency.cos(), magnitude * frequency.sin()], -1)
    return product_of(planes, state)


def advanced(x_BD: Tensor, rate_DP: Tensor, frequency_DP: Tensor | None, state_BDPN: Tensor) -> Tensor:
    """The state after one more token, whose input is real."""
    after = turned(state_BDPN, rate_DP, frequency_DP)
    real = after[..., :1] + x_BD[..., None, None]
    return real if frequency_DP is None else torch.cat([real, after[..., 1:]], -1)


def product_of(a: Tensor, b: Tensor) -> Tensor:
    """The product of numbers whose planes are the last axis."""
    if a.shape[-1] == 1:
        return a * b
    (p, q), (r, s) = a.unbind(-1), b.unbind(-1)
    return torch.stack([p * r - q * s, p * s + q * r], -1)


def conjugate(a: Tensor) -> Tensor:
    """The imaginary plane, if there is one, with the other sign."""
    return torch.cat([a[..., :1], -a[..., 1:]], -1)


def read_out(c_DPN: Tensor, h: Tensor) -> Tensor:
    """Re sum_p c h: [..., D, P, N] -> [..., D], in the dtype of h."""
    return (conjugate(c_DPN.to(h.dtype)) * h).sum((-2, -1))


def check_diagonal(
    x: Tensor,
    rate: Tensor,
    frequency: Tensor | None,
    c: Tensor,
    state: Tensor | None,
    *,
    is_step: bool = False,
) -> None:
    """Raise ValueError where a shape, dtype or device does not fit or, on a CPU, a rate is above 0."""
    check_axes("x", x, "batch, dim" if is_step else "batch, time, dim")
    check_shape("rate", rate, (x.shape[-1], "poles"))
    check_axes("rate", rate, "dim, poles")
    planes = (*rate.shape, 1 if frequency is None else 2)
    check_shape("frequency", frequency, rate.shape)
    check_shape("c", c, planes)
    check_shape("state", state, (x.shape[0], *planes), is_needed=is_step)
    check_alike(x=x, rate=rate, frequency=frequency, c=c, state=state)
    if not is_step:
        check_log("rate", rate)


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "reference": diagonal_ssm_reference,
    "torch": diagonal_ssm_torch,
    "triton": diagonal_ssm_triton,
}


def form(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The form of one backend. Raises ValueError where Triton is asked for and not installed."""
    if backend == "triton":
        gated_scan.form("triton")
    return FORMS[backend]


def step_form(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of one backend. Raises ValueError where Triton is asked for and not installed."""
    if backend == "triton":
        found: Callable[..., tuple[Tensor, Tensor]] = triton_form(
            "diagonal_ssm_step", "diagonal_ssm_step_triton"
        )
        return found
    return diagonal_ssm_step
