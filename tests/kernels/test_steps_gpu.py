"""Single tokens of recurrences that are made of others on a GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerance import assert_close, assert_steps_as_good
from torch import Tensor

from mixforge.kernels import (
    chunked_linear,
    diagonal_ssm,
    dplr,
    gated_scan,
    gated_scan_complex,
    log_linear,
    second_order,
    selective_scan,
    short_conv,
    slot_attention,
    softmax_scan,
    twofold_linear,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BATCH, HEADS, KEYS, VALUES, TOKENS = 3, 4, 64, 96, 12


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def of_keys() -> list[Tensor]:
    """q, k and v [B, T, H, *]; keys of a norm near 1."""
    q, k = (normal(BATCH, TOKENS, HEADS // 2, KEYS + n)[..., :KEYS] * KEYS**-0.5 for n in range(2))
    return [q, k, normal(BATCH, TOKENS, HEADS, VALUES)]


def scalars() -> list[Tensor]:
    return [-uniform(BATCH, TOKENS, HEADS), uniform(BATCH, TOKENS, HEADS)]


@torch.no_grad()
def check(
    forms: list[Callable[..., tuple[Tensor, Tensor]]],
    given: list[Tensor | None],
    dtype: torch.dtype,
    state: Tensor,
    *beside: Tensor,
) -> None:
    """Every token, `given` by [B, T, ...] and `beside` the same for all, and the state after it."""
    kept, wide = state.cuda(), state.cuda().double()
    # A state is float32; what is written to it has been rounded.
    ratio = 2 * max(torch.finfo(dtype).eps, 1e-5)
    for t in range(TOKENS):
        now = [None if x is None else x[:, t].to("cuda", dtype) for x in given]
        others = [x.cuda() for x in beside]
        o, kept = forms[0](*now, *others, kept)
        exact = [None if x is None else x.double() for x in (*now, *others)]
        expected, wide = forms[1](*exact, wide)
        assert_close("output", o, expected, ratio)
        assert_close("state", kept, wide, 1e-5)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "scalar", "channel"])
def test_linear(decay: str, is_delta: bool, dtype: torch.dtype) -> None:
    q, k, v = of_keys()
    log, beta = scalars()
    by_token = {"scalar": log, "channel": -uniform(BATCH, TOKENS, HEADS, KEYS)}.get(decay)
    fixed = -uniform(HEADS).to("cuda", dtype) if decay == "head" else None

    def step(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(q: Tensor, k: Tensor, v: Tensor, now: Tensor | None, beta: Tensor | None, state: Tensor):
            now = fixed.to(q.dtype) if fixed is not None else now
            return chunked_linear.step_form(name)(q, k, v, now, beta, state)

        return run

    given = [q, k, v, by_token, beta if is_delta else None]
    check([step(name) for name in ("triton", "torch")], given, dtype, normal(BATCH, HEADS, KEYS, VALUES))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("mixer", ["gdn", "kda", "mamba2(heads=4)", "gla", "retnet"])
def test_a_mixers_step_is_as_good_as_torchs(mixer: str, dtype: torch.dtype) -> None:
    assert_steps_as_good(f"lm({mixer} + swiglu, width=128)", dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_order(dtype: torch.dtype) -> None:
    steps = [second_order.step_form(name) for name in ("triton", "torch")]
    check(steps, [*of_keys(), scalars()[0], None], dtype, normal(BATCH, HEADS, KEYS, VALUES + KEYS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots(dtype: torch.dtype) -> None:
    steps = [slot_attention.step_form(name) for name in ("triton", "torch")]
    decay = -uniform(BATCH, TOKENS, HEADS, 32)
    check(steps, [*of_keys(), decay, None], dtype, normal(BATCH, HEADS, 32, VALUES + KEYS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_delta", [False, True])
def test_log_linear(is_delta: bool, dtype: torch.dtype) -> None:
    weight, numbers = uniform(BATCH, TOKENS, HEADS, 4), torch.arange(3, 3 + TOKENS, device="cuda")
    decay, beta = scalars()
    given = [*of_keys(), decay, beta if is_delta else None, weight]
    numbers_of = {"triton": iter(numbers), "torch": iter(numbers)}

    def step(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(*now: Tensor) -> tuple[Tensor, Tensor]:
            *first, share, state = now
            return log_linear.step_form(name)(*first, state, share, next(numbers_of[name]))

        return run

    # Three tokens have been read: two levels are open.
    state = normal(BATCH, HEADS, 4, KEYS, VALUES)
    state[:, :, 2:] = 0
    check([step(name) for name in ("triton", "torch")], given, dtype, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_complex", [False, True])
def test_diagonal_states(is_complex: bool, dtype: torch.dtype) -> None:
    planes = 2 if is_complex else 1
    fixed = [-uniform(70, 20), *([normal(70, 20)] if is_complex else []), normal(70, 20, planes)]

    def step(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(x: Tensor, rate: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
            *frequency, c, state = others
            return diagonal_ssm.step_form(name)(x, rate, frequency[0] if frequency else None, c, state)

        return run

    steps = [step(name) for name in ("triton", "torch")]
    check(steps, [normal(BATCH, TOKENS, 70)], dtype, normal(BATCH, 70, 20, planes), *fixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_scan(dtype: torch.dtype) -> None:
    steps = [gated_scan.step_form(name) for name in ("triton", "torch")]
    check(steps, [-uniform(BATCH, TOKENS, 70), normal(BATCH, TOKENS, 70)], dtype, normal(BATCH, 70))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_scan_complex(dtype: torch.dtype) -> None:
    steps = [gated_scan_complex.step_form(name) for name in ("triton", "torch")]
    given = [-uniform(BATCH, TOKENS, 70), normal(BATCH, TOKENS, 70), normal(BATCH, TOKENS, 2, 70)]
    check(steps, given, dtype, normal(BATCH, 2, 70))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selective_scan(dtype: torch.dtype) -> None:
    def step(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(
            x: Tensor, dt: Tensor, b: Tensor, c: Tensor, rate: Tensor, skip: Tensor, state: Tensor
        ) -> tuple[Tensor, Tensor]:
            return selective_scan.step_form(name)(x, dt, rate, b, c, skip, state)

        return run

    given = [normal(BATCH, TOKENS, 20), uniform(BATCH, TOKENS, 20), *2 * [normal(BATCH, TOKENS, 16)]]
    steps = [step(name) for name in ("triton", "torch")]
    check(steps, given, dtype, normal(BATCH, 20, 16), -8 * uniform(20, 16), normal(20))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [2, 4, 8])
def test_short_conv(taps: int, dtype: torch.dtype) -> None:
    """The state is some of the inputs, in their dtype."""
    inputs = (normal(BATCH, TOKENS, 70), normal(70, taps), normal(70), normal(BATCH, 70, taps - 1))
    x, weight, bias, state = (given.to("cuda", dtype) for given in inputs)
    wide = state.double()
    for t in range(TOKENS):
        y, state = short_conv.step_form("triton")(x[:, t], weight, bias, "silu", state)
        expected, wide = short_conv.step_form("torch")(
            x[:, t].double(), weight.double(), bias.double(), "silu", wide
        )
        assert_close("output", y, expected, 2 * max(torch.finfo(dtype).eps, 1e-5))
        assert torch.equal(state.double(), wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decays", [False, True])
def test_dplr(decays: bool, dtype: torch.dtype) -> None:
    steps = [dplr.step_form(name) for name in ("triton", "torch")]
    q, k, a = (normal(BATCH, TOKENS, HEADS, KEYS + n)[..., :KEYS] * KEYS**-0.5 for n in range(3))
    decay = -uniform(BATCH, TOKENS, HEADS, KEYS) if decays else None
    removal = torch.stack([a, a * uniform(BATCH, TOKENS, HEADS, KEYS)], -2)
    given = [q, k, normal(BATCH, TOKENS, HEADS, VALUES), decay, removal]
    check(steps, given, dtype, normal(BATCH, HEADS, KEYS, VALUES))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twofold_linear(dtype: torch.dtype) -> None:
    steps = [twofold_linear.step_form(name) for name in ("triton", "torch")]
    q, k = (normal(BATCH, TOKENS, HEADS, KEYS + n)[..., :KEYS] * KEYS**-0.5 for n in range(2))
    decays = [-uniform(BATCH, TOKENS, HEADS, size) for size in (KEYS, VALUES)]
    given = [q, k, normal(BATCH, TOKENS, HEADS, VALUES), *decays]
    check(steps, given, dtype, normal(BATCH, HEADS, KEYS, VALUES))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_scan(dtype: torch.dtype) -> None:
    scores, values = 5 * normal(BATCH, HEADS, TOKENS), normal(BATCH, HEADS, TOKENS, VALUES)
    scores, values = scores.to("cuda", dtype), values.to("cuda", dtype)
    carry, wide = softmax_scan.first_carry(values.float()), softmax_scan.first_carry(values.double())
    for t in range(TOKENS):
        o = softmax_scan.step_form("triton")(scores[:, :, t], values[:, :, t], carry)
        expected = softmax_scan.step_form("torch")(scores[:, :, t].double(), values[:, :, t].double(), wide)
        assert_close("output", o, expected, 2 * max(torch.finfo(dtype).eps, 1e-6))
        for name, kept, right in zip(("top", "weight", "sum"), carry, wide, strict=True):
            assert_close(name, kept, right, 1e-5)
