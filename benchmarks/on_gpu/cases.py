"""What is timed: operations with their inputs, their reference form, and who competes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels import (
    attention,
    chunked_linear,
    dplr,
    gated_scan,
    norm,
    recurrent_cells,
    selective_scan,
    short_conv,
    twofold_linear,
)
from on_gpu import rivals

DECAYS = ("none", "head", "scalar", "channel")
RULES = ("add", "delta")
STATES = 16
TAPS = 4

Inputs = tuple[Tensor | None, ...]
Operation = Callable[..., Tensor | tuple[Tensor, ...]]
Phase = Literal["forward", "both", "step"]


@dataclass(frozen=True, slots=True)
class Size:
    """Of the inputs; scans, convolutions and norms are H D channels wide."""

    batch: int
    length: int
    heads: int
    dim: int

    @property
    def text(self) -> str:
        length = "" if self.length == 1 else f"T{self.length} "
        return f"B{self.batch} {length}H{self.heads} D{self.dim}"


SIZES = (Size(64, 256, 4, 32), Size(32, 512, 4, 64), Size(8, 4096, 16, 128), Size(1, 32768, 32, 128))
STEP_SIZES = (Size(64, 1, 4, 32), Size(64, 1, 16, 128), Size(8, 1, 16, 128), Size(1, 1, 32, 128))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation with one set of inputs, and the forms of it by name. Ours are `triton` and `torch`."""

    op: str
    variant: str
    size: Size
    phases: tuple[Phase, ...]
    draw: Callable[[Size, torch.device, torch.dtype], Inputs]
    reference: Operation
    forms: Mapping[str, Operation]

    @property
    def label(self) -> str:
        return (
            f"{self.op} ({self.variant}) {self.size.text}" if self.variant else f"{self.op} {self.size.text}"
        )

    @property
    def is_step(self) -> bool:
        """Of one token; the last input is then a state, which is brought up to date in place."""
        return self.phases == ("step",)


def cases(quick: bool) -> Iterator[Case]:
    """All of a size together, so that they are timed beside one another."""
    for size in SIZES[:2] if quick else SIZES:
        yield from sequences(size)
    for size in STEP_SIZES[:2] if quick else STEP_SIZES:
        yield from steps(size)


def sequences(size: Size) -> Iterator[Case]:
    both: tuple[Phase, ...] = ("forward", "both")
    make = partial(Case, size=size, phases=both)
    for decay, rule in product(DECAYS, RULES):
        ours = {name: chunked_linear.form(name, rule, decay) for name in ("triton", "torch")}
        yield make(
            op="linear",
            variant=f"{decay}, {rule}",
            draw=partial(draw_linear, decay, rule),
            reference=chunked_linear.FORMS["reference"],
            forms={**ours, **rivals.linear_rivals(decay, rule)},
        )
    yield make(
        op="dplr",
        variant="",
        draw=draw_dplr,
        reference=dplr.FORMS["reference"],
        forms={**{name: dplr.form(name) for name in ("triton", "torch")}, **rivals.dplr_rivals()},
    )
    yield make(
        op="twofold_linear",
        variant="",
        draw=draw_twofold,
        reference=twofold_linear.FORMS["reference"],
        forms={name: twofold_linear.form(name) for name in ("triton", "torch")},
    )
    if size.length <= 512:
        # The torch form is a loop, whose every token takes several launches.
        yield make(
            op="recurrent_cell",
            variant="slstm",
            draw=draw_cell,
            reference=recurrent_cells.form("reference", "slstm"),
            forms={name: recurrent_cells.form(name, "slstm") for name in ("triton", "torch")},
        )
    yield make(
        op="attention",
        variant="causal",
        draw=draw_attention,
        reference=partial(attention.FORMS["reference"], start=0),
        forms={"sdpa": partial(attention.form("triton"), start=0)},
    )
    window = min(256, size.length // 4)
    yield make(
        op="attention",
        variant=f"window {window}",
        draw=draw_attention,
        reference=partial(attention.WINDOW_FORMS["reference"], window=window, past=0),
        forms={
            name: partial(attention.window_form(name), window=window, past=0) for name in ("triton", "torch")
        },
    )
    yield make(
        op="gated_scan",
        variant="",
        draw=draw_scan,
        reference=gated_scan.FORMS["reference"],
        forms={**{name: gated_scan.form(name) for name in ("triton", "torch")}, **rivals.scan_rivals()},
    )
    yield make(
        op="selective_scan",
        variant="",
        draw=draw_selective,
        reference=selective_scan.FORMS["reference"],
        forms={name: selective_scan.form(name) for name in ("triton", "torch")},
    )
    yield make(
        op="short_conv",
        variant="silu",
        draw=draw_conv,
        reference=partial(convolve, "reference"),
        forms={**{name: partial(convolve, name) for name in ("triton", "torch")}, **rivals.conv_rivals()},
    )
    yield make(
        op="norm",
        variant="plain",
        draw=draw_norm,
        reference=norm.form("reference"),
        forms={**{name: norm.form(name) for name in ("triton", "torch")}, **rivals.norm_rivals()},
    )
    yield make(
        op="norm",
        variant="gated",
        draw=draw_gated_norm,
        reference=norm.gated_form("reference"),
        forms={**{name: norm.gated_form(name) for name in ("triton", "torch")}, **rivals.gated_norm_rivals()},
    )


def steps(size: Size) -> Iterator[Case]:
    one: tuple[Phase, ...] = ("step",)
    make = partial(Case, size=size, phases=one)
    for decay, rule in product(DECAYS, RULES):
        ours = {name: chunked_linear.step_form(name) for name in ("triton", "torch")}
        yield make(
            op="linear",
            variant=f"{decay}, {rule}",
            draw=partial(draw_linear_step, decay, rule),
            reference=chunked_linear.step_form("reference"),
            forms={**ours, **rivals.linear_step_rivals(decay, rule)},
        )
    yield make(
        op="gated_scan",
        variant="",
        draw=draw_scan_step,
        reference=gated_scan.step_form("reference"),
        forms={name: gated_scan.step_form(name) for name in ("triton", "torch")},
    )
    yield make(
        op="selective_scan",
        variant="",
        draw=draw_selective_step,
        reference=partial(selective_step, "reference"),
        forms={name: partial(selective_step, name) for name in ("triton", "torch")},
    )
    yield make(
        op="short_conv",
        variant="silu",
        draw=draw_conv_step,
        reference=partial(convolve_step, "reference"),
        forms={name: partial(convolve_step, name) for name in ("triton", "torch")},
    )


def convolve(name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return short_conv.form(name)(x, weight, None, "silu")


def convolve_step(name: str, x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return short_conv.step_form(name)(x, weight, None, "silu", state)


def selective_step(
    name: str, x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return selective_scan.step_form(name)(x, dt, rate, b, c, None, state)


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def log_decay(decay: str, device: torch.device, heads: int, *shape: int) -> Tensor | None:
    """Those of a head are RetNet's, constants without a gradient; the others have float32, as in training."""
    if decay == "none":
        return None
    if decay == "head":
        return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, device=device))))
    uniform = torch.rand(*shape, device=device)
    return (-5 * uniform**4 if decay == "channel" else -uniform).requires_grad_()


def draw_linear(decay: str, rule: str, size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    shape = (size.batch, size.length, size.heads)
    q = (torch.randn(*shape, size.dim, device=device) * size.dim**-0.5).to(dtype).requires_grad_()
    k = F.normalize(torch.randn(*shape, size.dim, device=device), dim=-1).to(dtype).requires_grad_()
    v = normal(device, dtype, *shape, size.dim)
    of_decay = (*shape, size.dim) if decay == "channel" else shape
    beta = torch.rand(shape, device=device).to(dtype).requires_grad_() if rule == "delta" else None
    return q, k, v, log_decay(decay, device, size.heads, *of_decay), beta


def draw_dplr(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    q, k, v, decay, _ = draw_linear("channel", "add", size, device, dtype)
    assert k is not None
    removed = F.normalize(torch.randn(k.shape, device=device), dim=-1)
    strength = removed * torch.rand(k.shape, device=device)
    return q, k, v, decay, torch.stack([removed, strength], -2).to(dtype).requires_grad_()


def draw_twofold(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    q, k, v, decay, _ = draw_linear("channel", "add", size, device, dtype)
    return (
        q,
        k,
        v,
        decay,
        log_decay("channel", device, size.heads, size.batch, size.length, size.heads, size.dim),
    )


def draw_cell(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    gates = normal(device, dtype, size.batch, size.length, size.heads, 4 * size.dim)
    recurrent = torch.randn(size.heads, size.dim, 4 * size.dim, device=device) / math.sqrt(size.dim)
    return gates, recurrent.to(dtype).requires_grad_()


def draw_linear_step(decay: str, rule: str, size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    drawn = draw_linear(decay, rule, size, device, dtype)
    state = torch.randn(size.batch, size.heads, size.dim, size.dim, device=device)
    token = [x if x is None or x.dim() == 1 else x.detach()[:, 0].contiguous() for x in drawn]
    return *token, state


def draw_attention(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    q, k, v = (normal(device, dtype, size.batch, size.heads, size.length, size.dim) for _ in range(3))
    return q, k, v


def draw_scan(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    shape = (size.batch, size.length, size.heads * size.dim)
    return (-torch.rand(shape, device=device)).to(dtype).requires_grad_(), normal(device, dtype, *shape)


def draw_scan_step(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    log_a, b = draw_scan(size, device, dtype)
    assert log_a is not None
    assert b is not None
    return log_a.detach()[:, 0], b.detach()[:, 0], torch.randn(b[:, 0].shape, device=device)


def draw_selective(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    width = size.heads * size.dim
    x = normal(device, dtype, size.batch, size.length, width)
    dt = (0.1 * torch.rand(x.shape, device=device)).to(dtype).requires_grad_()
    # As Mamba begins: rates of -1 to -N.
    rate = -torch.arange(1.0, STATES + 1, device=device).repeat(width, 1).to(dtype)
    b, c = (normal(device, dtype, size.batch, size.length, STATES) for _ in range(2))
    return x, dt, rate.requires_grad_(), b, c, normal(device, dtype, width)


def draw_conv(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    width = size.heads * size.dim
    weight = (torch.randn(width, TAPS, device=device) / math.sqrt(TAPS)).to(dtype).requires_grad_()
    return normal(device, dtype, size.batch, size.length, width), weight


def draw_norm(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    width = size.heads * size.dim
    return normal(device, dtype, size.batch, size.length, width), normal(device, dtype, width)


def draw_gated_norm(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    x, weight = draw_norm(size, device, dtype)
    assert x is not None
    return x, normal(device, dtype, *x.shape), weight


def draw_selective_step(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    x, dt, rate, b, c, _ = (None if x is None else x.detach() for x in draw_selective(size, device, dtype))
    assert x is not None
    assert rate is not None
    token = (None if each is None else each[:, 0] for each in (x, dt))
    past = torch.randn(size.batch, *rate.shape, device=device)
    return *token, rate, *(None if each is None else each[:, 0] for each in (b, c)), past


def draw_conv_step(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    x, weight = (None if x is None else x.detach() for x in draw_conv(size, device, dtype))
    assert x is not None
    past = torch.randn(size.batch, x.shape[2], TAPS - 1, device=device).to(dtype)
    return x[:, 0], weight, past
