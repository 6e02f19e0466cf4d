"""Mamba's selective scan: the Triton form against the float64 loop, with every gradient."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_agree, assert_close
from torch import Tensor

from mixforge.kernels import gated_scan_triton, selective_scan, selective_scan_triton
from mixforge.kernels.launch import recording


def draw(length: int, *, batch: int = 1, width: int = 3, states: int = 3) -> list[Tensor]:
    dice = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, width, generator=dice)
    dt = 2 * torch.rand(batch, length, width, generator=dice)
    rate = -8 * torch.rand(width, states, generator=dice)
    rate[0, 0] = 0.0
    b, c = torch.randn(2, batch, length, states, generator=dice).unbind()
    return [
        x, dt, rate, b, c, torch.randn(width, generator=dice), torch.randn(batch, width, states, generator=dice),
    ]  # fmt: skip


TRITON, REFERENCE = selective_scan.form("triton"), selective_scan.form("reference")


@pytest.mark.parametrize("length", [1, 13])
def test_equals_the_recurrence(length: int) -> None:
    assert_agree(TRITON, REFERENCE, draw(length))


def test_the_time_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_scan_triton, "PROGRAMS", 3)
    assert_agree(TRITON, REFERENCE, draw(39))


def test_an_odd_batch_of_five_channels_without_state_and_skip() -> None:
    assert_agree(TRITON, REFERENCE, [*draw(9, batch=2, width=5, states=2)[:5], None, None])


def test_channels_lie_on_two_axes_where_states_fill_a_warp() -> None:
    assert_agree(TRITON, REFERENCE, draw(7, width=5, states=50))


def test_rates_that_forget_at_once() -> None:
    """What is left of the state is formed as a product: not the difference of two numbers that are almost one."""
    inputs = draw(9, states=1)
    inputs[2] = torch.full_like(inputs[2], -18.0)
    inputs[1] = torch.full_like(inputs[1], 1.0)
    assert_agree(TRITON, REFERENCE, inputs)


def test_steps_equal_the_scan_in_place() -> None:
    x, dt, rate, b, c, skip, state = draw(6, batch=3, width=5)
    expected, final = REFERENCE(x, dt, rate, b, c, skip, state)
    for t in range(6):
        y, after = selective_scan_triton.selective_scan_step_triton(
            x[:, t], dt[:, t], rate, b[:, t], c[:, t], skip, state
        )
        assert after is state
        assert_close("y", y, expected[:, t])
    assert_close("final state", state, final)


def test_registered_with_torch() -> None:
    leaves = [x.requires_grad_() for x in draw(3, width=2, states=2)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(selective_scan_triton._forward, (*leaves, True), test_utils=checks)
    x, dt, rate, b, c, skip, state = (x.detach() for x in leaves)
    step = tuple(value[:, 0].contiguous() for value in (x, dt, b, c))
    inputs = (step[0], step[1], rate, step[2], step[3], skip, state)
    torch.library.opcheck(selective_scan_triton._step, inputs, test_utils=checks)


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(TRITON, fullgraph=True, backend="aot_eager")
    assert_agree(compiled, REFERENCE, draw(3, width=2, states=2))


def test_meta_tensors_are_written_down_and_no_states_are_kept_without_gradients() -> None:
    inputs = [x.to("meta").requires_grad_() for x in draw(1024, width=16, states=16)]
    with recording("sm_90") as recorded:
        y, final = TRITON(*inputs)
        (y.sum() + final.sum()).backward()
    assert [one.name for one in recorded.launches] == [
        "selective_sums", "selective_forward", "selective_sums", "selective_backward",
    ]  # fmt: skip
    with recording("sm_90") as recorded, torch.no_grad():
        TRITON(*inputs)
    assert recorded.launches[1].args[11] is None
    whole = inputs[0].numel() * 16
    for one in recorded.launches:
        assert all(not isinstance(arg, Tensor) or arg.numel() < whole for arg in one.args)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_refuses_what_does_not_fit(backend: str) -> None:
    run, inputs = selective_scan.form(backend), draw(4)
    with pytest.raises(ValueError, match="length of 0"):
        run(inputs[0][:, :0], *inputs[1:])
    for position, name in ((1, "dt"), (2, "rate"), (3, "b"), (4, "c"), (5, "skip"), (6, "state")):
        wrong = [*inputs]
        wrong[position] = (
            wrong[position][:1, ..., :1] if position > 2 and position != 5 else inputs[position][:-1]
        )
        if position == 2:
            wrong[position] = inputs[position][:2]
        with pytest.raises(ValueError, match=f"{name} has shape"):
            run(*wrong)


def test_triton_refuses_more_states_than_a_tile_holds() -> None:
    with pytest.raises(ValueError, match="at most 64"):
        TRITON(*draw(1, states=65))
