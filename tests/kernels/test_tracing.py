"""Every autograd function that `torch.compile` traces, where its result and a view of it leave the graph; and sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from mixforge.kernels import chunked_linear, gated_scan, gated_scan_complex, short_conv
from mixforge.kernels.norm import quotient_norm, rms_norm_torch, unit_norm
from mixforge.kernels.tracing import fixed
from mixforge.search_space.parts.experts import permuted
from mixforge.search_space.parts.rotary import turn
from mixforge.search_space.parts.routing import AttachLoss

LENGTH, HEADS, DIM = 3, 2, 3


def permute(x: Tensor, w: Tensor) -> Tensor:
    order = torch.arange(LENGTH).roll(1)
    return permuted((x * w)[0], order, order.argsort())[None]


def attach(x: Tensor, w: Tensor) -> Tensor:
    attached: Tensor = AttachLoss.apply(x * w, w.square().sum())  # type: ignore[no-untyped-call]
    return attached


def scan(x: Tensor, w: Tensor) -> Tensor:
    return gated_scan.gated_scan_torch(-w.square() + 0 * x, x)[0]


def complex_scan(x: Tensor, w: Tensor) -> Tensor:
    planes = torch.stack([x, x * w], 2)
    return gated_scan_complex.gated_scan_complex_torch(-w.square() + 0 * x, x, planes)[0]


def linear(x: Tensor, w: Tensor) -> Tensor:
    heads = (x * w).view(-1, LENGTH, HEADS, DIM)
    return chunked_linear.form("torch", "add", "none")(heads, 2 * heads, 3 * heads, None, None)[0]


def quotient(x: Tensor, w: Tensor) -> Tensor:
    weight = w.view(HEADS, DIM)
    return quotient_norm(x.view(-1, LENGTH, HEADS, DIM), w.new_tensor(0.5), weight[:, 1:], weight[:, :-1])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(permute, id="permuted"),
        pytest.param(attach, id="attached loss"),
        pytest.param(lambda x, w: turn(x[:, :, None], w[:3]), id="turn"),
        pytest.param(lambda x, w: unit_norm(x * w), id="unit norm"),
        pytest.param(rms_norm_torch, id="rms norm"),
        pytest.param(quotient, id="quotient norm"),
        pytest.param(lambda x, w: short_conv.short_conv_torch(x, w[:, None])[0], id="convolution"),
        pytest.param(scan, id="scan"),
        pytest.param(complex_scan, id="complex scan"),
        pytest.param(linear, id="linear"),
    ],
)
def test_gradients_are_those_without_a_compiler(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    def with_a_view(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = function(x, w)
        return y, y[:, -1]

    def results(run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        dice = torch.Generator().manual_seed(0)
        x = torch.randn(2, LENGTH, HEADS * DIM, generator=dice, dtype=torch.float64)
        w = torch.randn(HEADS * DIM, generator=dice, dtype=torch.float64)
        leaves = [x.requires_grad_(), w.requires_grad_()]
        y, last = run(*leaves)
        loss = (y * torch.randn(y.shape, generator=dice, dtype=torch.float64)).sum() + last.square().sum()
        return [y.detach(), *torch.autograd.grad(loss, leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(with_a_view, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(results(compiled), results(with_a_view), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_fixed_size_gets_no_symbol() -> None:
    """Where the second size of a dimension would be one."""
    torch._dynamo.reset()
    kinds: dict[bool, list[bool]] = {False: [], True: []}

    def run(x: Tensor, is_fixed: bool) -> Tensor:
        return x * (fixed(x.shape[1]) if is_fixed else x.shape[1])

    for is_fixed, found in kinds.items():

        def seen(graph: GraphModule, given: list[Tensor], found: list[bool] = found) -> GraphModule:
            found.append(any(isinstance(each, torch.SymInt) for each in given))
            return graph

        compiled = torch.compile(run, fullgraph=True, backend=seen)
        for size in (5, 7, 9):
            assert compiled(torch.ones(1, size), is_fixed).sum() == size * size
        torch._dynamo.reset()
    assert kinds == {False: [False, True], True: [False, False, False]}
