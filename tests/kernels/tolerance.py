"""The one measure of error of the kernels' tests, RMS(actual - expected) / RMS(expected), and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mixforge.search_space.mixer import Backend
from mixforge.search_space.notation import parse

# A few roundings of the accumulators, for sums of a few hundred terms.
FLOAT32 = 3e-6


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """The ratio of RMS errors. Where all that is expected is zero, the RMS error itself."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} is not {list(expected.shape)}"
    wanted = expected.double()
    error, scale = (x.square().mean().sqrt().item() for x in (actual.double() - wanted, wanted))
    return error / scale if scale > 0 else error


def assert_close(name: str, actual: Tensor, expected: Tensor, ratio: float = FLOAT32) -> None:
    """The quantity `name` is within `ratio` of what is expected. NaN never is."""
    error = error_ratio(actual, expected)
    assert error <= ratio, f"{name}: RMS error ratio {error:.3g}, at most {ratio:.3g} allowed"


def results(
    operation: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Outputs, and gradients of a weighted sum of all of them for all inputs of a floating dtype, by name."""
    leaves = [
        x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs
    ]
    outputs = operation(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output in outputs:
        weights = torch.arange(1, output.numel() + 1, device=output.device).double().sin().view_as(output)
        # Weights that every dtype holds, so that all forms receive the same gradients.
        loss = loss + (output.double() * weights.to(torch.bfloat16)).sum()
    loss.backward()
    found = {f"output {n}": output.detach() for n, output in enumerate(outputs)}
    for n, leaf in enumerate(leaves):
        if leaf is not None and leaf.is_floating_point():
            assert leaf.grad is not None, f"input {n} has no gradient"
            found[f"gradient of input {n}"] = leaf.grad
    return found


def widened(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Floating inputs in float64."""
    return [x.double() if x is not None and x.is_floating_point() else x for x in inputs]


def assert_agree(
    actual: Callable[..., Tensor | tuple[Tensor, ...]],
    expected: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    ratio: float = FLOAT32,
    **others: float,
) -> None:
    """Outputs and gradients of a form are those of another in float64; `gradient_3=1e-4` is another ratio for one."""
    wanted = results(expected, widened(inputs))
    for name, value in results(actual, inputs).items():
        allowed = others.get(name.replace(" of input ", "_").replace(" ", "_"), ratio)
        assert_close(name, value, wanted[name], allowed)


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with as many binary digits as the dtype has, whatever its size."""
    digits = 1 - torch.tensor(torch.finfo(dtype).eps).log2()
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2**digits) / 2**digits, exponent)


class Rounded(torch.autograd.Function):
    """An operand in a dtype; its gradient stays as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return nearest(x, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class GradientRounded(torch.autograd.Function):
    """A product as it is; its gradient, an operand of the products of backward, in a dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return nearest(gradient, ctx.dtype), None


@contextmanager
def products_in(dtype: torch.dtype) -> Generator[None]:
    """torch's products take operands in a dtype and sum in float32, as a device does, forward and backward."""
    products = (torch.bmm, torch.baddbmm, Tensor.__matmul__)

    def within(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*given: Tensor, **others: Tensor) -> Tensor:
            *total, a, b = given
            made = product(*total, Rounded.apply(a, dtype), Rounded.apply(b, dtype), **others)
            return GradientRounded.apply(made, dtype)

        return run

    bmm, baddbmm, matmul = map(within, products)
    with (
        mock.patch.multiple(torch, bmm=bmm, baddbmm=baddbmm),
        mock.patch.object(Tensor, "__matmul__", matmul),
    ):
        yield


def assert_as_good(
    actual: Callable[..., Tensor | tuple[Tensor, ...]],
    rival: Callable[..., Tensor | tuple[Tensor, ...]],
    expected: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    least: float | None = None,
) -> None:
    """Errors of a form against another in float64 are at most twice those of a rival in the same dtype.

    A rival's error counts as `least`, or one rounding to the dtype, at least.
    """
    wanted, dtype = results(expected, widened(inputs)), next(x.dtype for x in inputs if x is not None)
    with products_in(dtype):
        allowed = results(rival, inputs)
    least = least or max(FLOAT32, torch.finfo(dtype).eps / 2)
    for name, value in results(actual, inputs).items():
        assert_close(name, value, wanted[name], 2 * max(error_ratio(allowed[name], wanted[name]), least))


def assert_steps_as_good(text: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Logits of single tokens after a prefill, in Triton's kernels: as `assert_as_good`, whole models in a dtype."""
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)

    def logits(backend: Backend, dtype: torch.dtype) -> Tensor:
        model = parse(text).build(backend, device=device, dtype=dtype)
        _, state = model.prefill(tokens[:, :3], capacity=9)
        made = []
        for position in range(3, 9):
            now, state = model.step(tokens[:, position], state)
            made.append(now)
        return torch.stack(made, 1)

    with torch.no_grad():
        exact = logits("torch", torch.float64)
        allowed = error_ratio(logits("torch", dtype), exact)
        assert allowed <= 20 * torch.finfo(dtype).eps
        assert_close("logits", logits("triton", dtype), exact, 2 * allowed)
