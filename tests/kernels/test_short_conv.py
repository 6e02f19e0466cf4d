"""The short convolution against a float64 loop over tokens and taps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixforge.kernels.short_conv import FORMS, short_conv_step


def draw(length: int, taps: int, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    shapes = ((2, length, width), (width, taps), (width,), (2, width, taps - 1))
    return [torch.randn(*shape, generator=dice, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, state: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    taps = weight.shape[1]
    for b in range(x.shape[0]):
        for d in range(x.shape[2]):
            line = state[b, d].tolist() + x[b, :, d].tolist()
            for t in range(x.shape[1]):
                value = sum(float(weight[d, j]) * line[t + j] for j in range(taps))
                value += 0.0 if bias is None else float(bias[d])
                y[b, t, d] = value / (1 + math.exp(-value)) if activation == "silu" else value
    return y


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 8), (13, 2), (33, 3)])
def test_equals_the_sum_over_taps(backend: str, activation: str, length: int, taps: int) -> None:
    x, weight, bias, state = draw(length, taps)
    for offset in (None, bias):
        y, after = FORMS[backend](x, weight, offset, activation, state)
        torch.testing.assert_close(y, oracle(x, weight, offset, activation, state))
        inputs = torch.cat([state, x.transpose(1, 2)], 2)
        torch.testing.assert_close(after, inputs[:, :, inputs.shape[2] - (taps - 1) :])
    y, _ = FORMS[backend](x, weight, bias, activation, None)
    torch.testing.assert_close(y, oracle(x, weight, bias, activation, torch.zeros_like(state)))


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_steps_equal_the_convolution(activation: str) -> None:
    x, weight, bias, state = draw(9, 4)
    expected, final = FORMS["torch"](x, weight, bias, activation, state)
    for t in range(9):
        y, state = short_conv_step(x[:, t], weight, bias, activation, state)  # type: ignore[arg-type]
        torch.testing.assert_close(y, expected[:, t])
    torch.testing.assert_close(state, final)


def test_a_state_carries_a_sequence_across_pieces() -> None:
    x, weight, bias, state = draw(30, 4)
    expected, final = FORMS["torch"](x, weight, bias, "silu", state)
    pieces = []
    for piece in x.split([1, 2, 27], 1):
        y, state = FORMS["torch"](piece, weight, bias, "silu", state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), expected)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize(
    "wanted", [parts for n in (1, 2, 3) for parts in itertools.combinations(range(3), n)]
)
def test_gradients_of_what_is_asked_for(wanted: tuple[int, ...]) -> None:
    gradients = []
    for operation in FORMS.values():
        x, weight, bias, _ = draw(20, 4)
        leaves = [(x, weight, bias)[part].requires_grad_() for part in wanted]
        y, _ = operation(x, weight, bias, "none", None)
        # A gradient that is one number for all of y.
        gradients.append(torch.autograd.grad(y.sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_without_a_bias() -> None:
    gradients = []
    for operation in FORMS.values():
        x, weight, _, _ = (leaf.requires_grad_() for leaf in draw(20, 4))
        y, _ = operation(x, weight, None, "silu", None)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, weight]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_keep_their_dtypes_under_autocast() -> None:
    leaves = [leaf.requires_grad_() for leaf in draw(20, 4, dtype=torch.float32)[:3]]
    plain = torch.autograd.grad(FORMS["torch"](*leaves, "none", None)[0].sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = FORMS["torch"](*leaves, "none", None)
    assert y.dtype == torch.bfloat16
    for leaf, found, expected in zip(leaves, torch.autograd.grad(y.sum(), leaves), plain, strict=True):
        assert found.dtype == leaf.dtype
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_gradients_of_both_forms_agree() -> None:
    weights = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for operation in FORMS.values():
        leaves = [x.requires_grad_() for x in draw(20, 4)]
        x, weight, bias, state = leaves
        y, after = operation(x, weight, bias, "silu", state)
        gradients.append(torch.autograd.grad((y * weights).sum() + after.square().sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("taps", [1, 2, 4, 8])
@pytest.mark.parametrize("has_state", [False, True])
def test_packed_sequences_are_one_graph(has_state: bool, taps: int) -> None:
    """Sequences of 1, 2, 3 and 14 tokens, their states and their gradients."""
    torch._dynamo.reset()
    bounds = torch.tensor([0, 1, 3, 6, 20])
    compiled = torch.compile(FORMS["torch"], fullgraph=True, backend="aot_eager")
    weights = torch.randn(1, 20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for operation in (FORMS["reference"], FORMS["torch"], compiled):
        x, weight, bias, _ = draw(20, taps)
        state = torch.randn(4, 5, taps - 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (x[:1], weight, bias, *([state] if has_state else []))]
        y, after = operation(*leaves[:3], "silu", state if has_state else None, bounds)
        gradients = torch.autograd.grad(
            (y * weights).sum() + after.square().sum(), leaves, allow_unused=taps == 1
        )
        found.append([y, after, *(each for each in gradients if each is not None)])
    for others in found[1:]:
        for other, expected in zip(others, found[0], strict=True):
            torch.testing.assert_close(other, expected)


def test_flops_are_two_a_tap_and_channel() -> None:
    x, weight, bias, _ = draw(31, 4, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        FORMS["torch"](x[:1], weight, bias, "silu", None)
    assert counter.get_total_flops() == 2 * 31 * 5 * 4


def test_the_state_is_no_view_of_the_inputs() -> None:
    x, weight, bias, state = draw(6, 3)
    _, after = FORMS["torch"](x, weight, bias, "none", state)
    kept = after.clone()
    x.zero_()
    state.zero_()
    assert torch.equal(after, kept)
