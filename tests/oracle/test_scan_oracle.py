"""gated_scan against fla-core's plain recurrence of HGRN: outputs, final state and every gradient."""

from __future__ import annotations

import os

import pytest
import torch
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from tolerance import assert_close
from torch import Tensor

from mixforge.kernels import gated_scan

RATIO = 1e-5
FORMS = ("triton",) if os.environ.get("TRITON_INTERPRET") else ("reference", "torch")


def ours(name: str, log: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    if name == "triton":
        from mixforge.kernels.gated_scan_triton import gated_scan_triton

        return gated_scan_triton(log, value, state)
    return gated_scan.FORMS[name](log, value, state)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [1, 13, 70])
def test_agrees(name: str, length: int) -> None:
    make = torch.Generator().manual_seed(length)
    log = -torch.nn.functional.softplus(torch.randn(3, length, 20, generator=make))
    value = torch.randn(3, length, 20, generator=make)
    state = torch.randn(3, 20, generator=make)

    def theirs(log: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return naive_recurrent_hgrn(value, log, state, output_final_state=True)

    results = []
    for run in (theirs, lambda *args: ours(name, *args)):
        leaves = [x.clone().requires_grad_() for x in (log, value, state)]
        h, final = run(*leaves)
        weights = torch.Generator().manual_seed(0)
        loss = (h * torch.randn(h.shape, generator=weights)).sum()
        loss = loss + (final * torch.randn(final.shape, generator=weights)).sum()
        results.append([h.detach(), final.detach(), *torch.autograd.grad(loss, leaves)])
    expected, actual = results
    for label, one, other in zip(("h", "final", "dlog_a", "db", "dstate"), actual, expected, strict=True):
        assert_close(f"{name} {label}", one, other, RATIO)
