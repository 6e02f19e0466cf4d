"""Scans with real and complex gates: the Triton form against the float64 loop, with every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_agree, assert_close
from torch import Tensor

from mixforge.kernels import gated_scan, gated_scan_complex, gated_scan_triton, operands
from mixforge.kernels.launch import recording

PACKED = torch.tensor([0, 1, 18, 40])


def draw(
    length: int, kind: str, *, batch: int = 1, width: int = 3, sequences: int | None = None
) -> list[Tensor]:
    dice = torch.Generator().manual_seed(length)
    log_a = -torch.rand(batch, length, width, generator=dice)
    log_a[:, ::7], log_a[:, 3::7], log_a[:, 5::11] = -math.inf, 0.0, -1000.0
    phase = 7 * torch.randn(batch, length, width, generator=dice)
    b = torch.randn(batch, length, 2, width, generator=dice)
    state = torch.randn(sequences or batch, 2, width, generator=dice)
    return [log_a, phase, b, state] if kind == "complex" else [log_a, b[:, :, 0], state[:, 0].contiguous()]


def forms(kind: str) -> tuple:
    module = gated_scan if kind == "real" else gated_scan_complex
    return module.form("triton"), module.form("reference")


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("length", [1, 13, 65])
def test_equals_the_recurrence(length: int, kind: str) -> None:
    assert_agree(*forms(kind), draw(length, kind))


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_time_in_segments(kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_scan_triton, "PROGRAMS", 3)
    inputs = draw(40, kind, sequences=3) if packed else draw(63, kind)
    assert gated_scan_triton.cut_time(40, 1, 16) == (3, 16)
    assert_agree(*forms(kind), [*inputs, PACKED] if packed else inputs)


def test_a_long_sequence_of_many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_scan_triton, "PROGRAMS", 64)
    log_a, b, state = draw(280, "real", width=2)
    assert gated_scan_triton.cut_time(280, 1, 16)[0] == 18
    with torch.no_grad():
        h, final = gated_scan_triton.gated_scan_triton(log_a, b, state)
    expected, last = gated_scan.FORMS["reference"](log_a.double(), b.double(), state.double())
    assert_close("h", h, expected)
    assert_close("final state", final, last)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_an_odd_batch_of_five_channels_without_state(kind: str) -> None:
    inputs = draw(17, kind, batch=3, width=5)
    assert_agree(*forms(kind), [*inputs[:-1], None])


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_packed_sequences(kind: str) -> None:
    inputs = draw(40, kind, sequences=3)
    assert_agree(*forms(kind), [*inputs, PACKED.int()])
    assert_agree(*forms(kind), [*inputs[:-1], None, PACKED])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("has_state", [False, True])
def test_sequences_without_a_token(
    has_state: bool, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a GPU does not tell of: behind one is the state before it, with its gradient."""
    monkeypatch.setattr(operands, "check_packed", lambda *_: None)
    *inputs, state = draw(7, kind, sequences=6)
    module = gated_scan if kind == "real" else gated_scan_complex
    full = torch.tensor([1, 4])

    def expected(*given: Tensor) -> tuple[Tensor, Tensor]:
        *operands, before = given if has_state else (*given, state.double())
        h, after = module.form("reference")(
            *operands, before[full] if has_state else None, torch.tensor([0, 3, 7])
        )
        return h, (before if has_state else torch.zeros_like(before)).index_copy(0, full, after)

    def found(*given: Tensor) -> tuple[Tensor, Tensor]:
        operands, before = (given[:-1], given[-1]) if has_state else (given, None)
        return module.form(backend)(*operands, before, torch.tensor([0, 0, 3, 3, 3, 7, 7]))

    assert_agree(found, expected, [*inputs, state] if has_state else inputs)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_steps_equal_the_scan_in_place(kind: str) -> None:
    *inputs, state = draw(6, kind, batch=3, width=5)
    module = gated_scan if kind == "real" else gated_scan_complex
    expected, final = module.FORMS["reference"](*inputs, state)
    run = "gated_scan_step_triton" if kind == "real" else "gated_scan_complex_step_triton"
    for t in range(6):
        h, after = getattr(gated_scan_triton, run)(*(x[:, t] for x in inputs), state)
        assert after is state
        assert_close("h", h, expected[:, t])
    assert_close("final state", state, final)


def test_phases_of_a_hundred_turns() -> None:
    log_a, phase, b, state = draw(5, "complex")
    inputs = [log_a.clamp(min=-1), 100 * phase, b, state]
    assert_agree(*forms("complex"), inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_registered_with_torch(packed: bool) -> None:
    log_a, phase, b, state = draw(40, "complex", width=2, sequences=3 if packed else 1)
    leaves = [x.requires_grad_() for x in (log_a.clamp(min=-1).detach(), phase, b, state)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    bounds = PACKED if packed else None
    torch.library.opcheck(gated_scan_triton._forward, (*leaves, bounds), test_utils=checks)
    real = (leaves[0], None, b[:, :, 0].contiguous(), state[:, 0].contiguous())
    torch.library.opcheck(gated_scan_triton._forward, (*real, bounds), test_utils=checks)
    step = (log_a[:, 0], None, b[:, 0, 0].detach().contiguous(), state[:1, 0].detach().contiguous())
    torch.library.opcheck(gated_scan_triton._step_op, step, test_utils=checks)


def test_compiles_as_one_graph() -> None:
    inputs = draw(9, "real")
    compiled = torch.compile(gated_scan_triton.gated_scan_triton, fullgraph=True, backend="aot_eager")
    assert_agree(compiled, gated_scan.FORMS["reference"], inputs)


def test_meta_tensors_are_written_down() -> None:
    inputs = [x.to("meta").requires_grad_() for x in draw(4096, "real", width=64)]
    with recording("sm_90") as recorded:
        h, final = gated_scan_triton.gated_scan_triton(*inputs)
        (h.sum() + final.sum()).backward()
    assert [one.name for one in recorded.launches] == [
        "scan_sums", "scan_forward", "scan_sums", "scan_backward",
    ]  # fmt: skip
    assert h.shape == inputs[1].shape


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_refuses_what_does_not_fit(backend: str) -> None:
    log_a, phase, b, state = draw(4, "complex")
    for name, run, one, gates in (
        ("real", gated_scan.form(backend), b[:, :, 0], (log_a,)),
        ("complex", gated_scan_complex.form(backend), b, (log_a, phase)),
    ):
        first = state if name == "complex" else state[:, 0]
        with pytest.raises(ValueError, match="length of 0"):
            run(*(x[:, :0] for x in gates), one[:, :0], first)
        with pytest.raises(ValueError, match="log_a"):
            run(*(x[:, :2] for x in gates), one, first)
        with pytest.raises(ValueError, match="state has shape"):
            run(*gates, one, first[..., :2])
        with pytest.raises(ValueError, match="rise from 0 to the length 4"):
            run(*gates, one, None, torch.tensor([0, 2, 2, 4]))
        with pytest.raises(ValueError, match="int32 or int64"):
            run(*gates, one, None, torch.tensor([0.0, 4.0]))
    with pytest.raises(ValueError, match="batch of 1"):
        gated_scan.form(backend)(
            log_a.expand(2, 4, 3), b[:, :, 0].expand(2, 4, 3), None, torch.tensor([0, 4])
        )


def test_triton_refuses_other_dtypes_and_states() -> None:
    log_a, b, state = draw(4, "real")
    with pytest.raises(ValueError, match=r"b is torch\.float64"):
        gated_scan_triton.gated_scan_triton(log_a.double(), b.double(), state.double())
    with pytest.raises(ValueError, match="it must be float32 and contiguous"):
        gated_scan_triton.gated_scan_step_triton(log_a[:, 0], b[:, 0], state.half())
