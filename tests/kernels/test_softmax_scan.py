"""The scan of softmax: its chunks against the recurrence, its gradients, its carry, its step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixforge.kernels.softmax_scan import (
    form,
    scan_flops,
    softmax_scan_reference,
    softmax_scan_step,
    softmax_scan_torch,
)


def inputs(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    z_BHT = 5 * torch.randn(2, 3, length, generator=generator, dtype=torch.float64)
    return z_BHT.to(dtype), torch.randn(2, 3, length, 5, generator=generator, dtype=torch.float64).to(dtype)


def softmax_of_each_prefix(z_BHT: Tensor, v_BHTV: Tensor) -> Tensor:
    return torch.stack(
        [
            (z_BHT[:, :, : t + 1].softmax(2)[..., None] * v_BHTV[:, :, : t + 1]).sum(2)
            for t in range(z_BHT.shape[2])
        ],
        2,
    )


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_outputs_are_the_softmax_of_each_prefix(length: int, backend: str) -> None:
    z_BHT, v_BHTV = inputs(length)
    o_BHTV, _ = form(backend)(z_BHT, v_BHTV, None)
    torch.testing.assert_close(o_BHTV, softmax_of_each_prefix(z_BHT, v_BHTV))


@pytest.mark.parametrize("operation", [softmax_scan_reference, softmax_scan_torch])
def test_a_carry_goes_on_where_it_stopped(operation: object) -> None:
    z_BHT, v_BHTV = inputs(77)
    expected = softmax_of_each_prefix(z_BHT, v_BHTV)
    assert callable(operation)
    _, carry = operation(z_BHT[:, :, :40], v_BHTV[:, :, :40], None)
    o_BHTV, carry = operation(z_BHT[:, :, 40:76], v_BHTV[:, :, 40:76], carry)
    torch.testing.assert_close(o_BHTV, expected[:, :, 40:76])
    o_BHV = softmax_scan_step(z_BHT[:, :, 76], v_BHTV[:, :, 76], carry)
    torch.testing.assert_close(o_BHV, expected[:, :, 76])


def test_gradients_are_those_of_softmax() -> None:
    gradients = []
    for operation in (softmax_of_each_prefix, softmax_scan_torch):
        z_BHT, v_BHTV = (x.requires_grad_() for x in inputs(70))
        result = (
            operation(z_BHT, v_BHTV)
            if operation is softmax_of_each_prefix
            else softmax_scan_torch(z_BHT, v_BHTV, None)[0]
        )
        (result * torch.linspace(-1, 1, 5, dtype=torch.float64)).sum().backward()
        gradients.append((z_BHT.grad, v_BHTV.grad))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_scores_that_differ_widely_neither_overflow_nor_vanish() -> None:
    z_BHT = torch.tensor([-3000.0, 3000.0, -3000.0] * 30)[None, None].requires_grad_()
    v_BHTV = torch.arange(90.0)[None, None, :, None]
    o_BHTV, _ = softmax_scan_torch(z_BHT, v_BHTV, None)
    o_BHTV.sum().backward()
    assert o_BHTV[0, 0, 0, 0] == 0
    assert o_BHTV[0, 0, 3, 0] == 1
    assert torch.isfinite(o_BHTV).all()
    assert z_BHT.grad is not None
    assert torch.isfinite(z_BHT.grad).all()


def test_flops_are_counted() -> None:
    for length in (1, 32, 100):
        z_BHT, v_BHTV = (x[:1] for x in inputs(length))
        with FlopCounterMode(display=False) as counter:
            softmax_scan_torch(z_BHT, v_BHTV, None)
        assert counter.get_total_flops() == scan_flops(3, length, 5)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="length of 0"):
        softmax_scan_torch(torch.zeros(1, 1, 0), torch.zeros(1, 1, 0, 2), None)
