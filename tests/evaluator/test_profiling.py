"""Latency and memory of one architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixforge.evaluator.evaluation import PHASES, Outcome, Profile, Workload
from mixforge.evaluator.profiling import profile
from mixforge.search_space.notation import parse

_TEXT = "lm(attn + gdn + attn(window=8) + mlp, width=16)"


def _profile(text: str = _TEXT, workload: Workload | None = None, device: str = "cpu") -> Profile:
    return profile(parse(text), workload or Workload(context=24), device, seconds=0.02)


def test_all_phases_are_timed_and_every_repeat_is_kept() -> None:
    found = _profile()
    assert found.outcome is Outcome.ok
    assert found.reason is None
    assert [timing.phase for timing in found.timings] == list(PHASES)
    for timing in found.timings:
        assert 5 <= len(timing.raw_ms) <= 100
        assert all(ms > 0 for ms in timing.raw_ms)
        assert not timing.captured
    assert found.peak_bytes is not None


def test_peak_holds_weights_gradients_and_moments_and_grows_with_context() -> None:
    params = parse(_TEXT).cost(1).params
    small, large = (_profile(workload=Workload(context=context)).peak_bytes for context in (8, 200))
    assert small is not None
    assert large is not None
    assert 16 * params <= small < large


def test_peak_is_exact() -> None:
    peaks = {_profile().peak_bytes for _ in range(2)}
    assert len(peaks) == 1


def test_decode_starts_after_a_real_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixforge.search_space.model import LanguageModel, State

    seen: list[tuple[int, int, int, float]] = []
    step = LanguageModel.step

    def watched(self: LanguageModel, token_B: torch.Tensor, state: State) -> object:
        cached = sum(float(t.double().abs().sum()) for layer in state.layers for t in layer.values())
        seen.append((state.length, int(state.position), token_B.shape[0], cached))
        return step(self, token_B, state)

    monkeypatch.setattr(LanguageModel, "step", watched)
    _profile(workload=Workload(batch=3, context=24))
    assert len(seen) > 5
    # Every repeat starts from one and the same state, that of 24 tokens.
    assert len(set(seen)) == 1
    assert seen[0][:3] == (24, 24, 3)
    assert seen[0][3] > 0


def test_train_steps_leave_the_weights() -> None:
    from mixforge.evaluator.profiling import _TrainStep

    model = parse("lm(attn + mlp, width=16)").build()
    before = [weight.detach().clone() for weight in model.parameters()]
    work = _TrainStep(model, Workload(context=8)).prepare()
    for _ in range(3):
        work()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_half_precision() -> None:
    found = _profile(workload=Workload(context=12, dtype="bfloat16"))
    assert found.outcome is Outcome.ok, found.trace


def test_failures_are_outcomes() -> None:
    illegal = parse("lm(attn(heads=5) + mlp, width=16)")
    found = profile(illegal, Workload(context=8))
    assert found.outcome is Outcome.illegal
    assert found.reason == illegal.why_illegal()
    assert found.timings == ()
    late = profile(parse(_TEXT), Workload(context=8), deadline_s=1e-9)
    assert late.outcome is Outcome.timed_out
    huge = profile(parse("lm(200 * (attn + swiglu), width=32768)"), Workload(context=8))
    assert huge.outcome is Outcome.out_of_memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_is_a_captured_graph_on_cuda(dtype: str) -> None:
    workload = Workload(batch=2, context=64, dtype=dtype)  # type: ignore[arg-type]
    found = _profile(workload=workload, device="cuda")
    assert found.outcome is Outcome.ok, found.trace
    decode = found.timing("decode")
    assert decode is not None
    assert decode.captured
    assert found.peak_bytes


def captured_step(token_B: torch.Tensor) -> tuple[Any, Any, Any]:
    """A model on a GPU, the state behind a prompt, and the captured step of a token, which nobody else keeps."""
    from mixforge.evaluator.profiling import _CapturedDecode

    model = parse(_TEXT).build(device="cuda")
    _, state = model.prefill(torch.randint(256, (2, 30), device="cuda"), capacity=31)
    return model, state, _CapturedDecode(model, token_B, state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_step_gives_the_step_s_logits() -> None:
    token_B = torch.randint(256, (2,), device="cuda")
    model, state, captured = captured_step(token_B)
    for _ in range(3):
        captured.prepare()()
    torch.cuda.synchronize()
    expected, _ = model.step(token_B, state)
    torch.testing.assert_close(captured.result[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_step_keeps_the_token_that_it_reads() -> None:
    model, state, captured = captured_step(torch.full((2,), 7, device="cuda"))
    # Whatever was freed is written over with what is no token.
    spoilt = [torch.full((2,), 1 << 40, device="cuda") for _ in range(1000)]
    captured.prepare()()
    torch.cuda.synchronize()
    del spoilt
    expected, _ = model.step(torch.full((2,), 7, device="cuda"), state)
    torch.testing.assert_close(captured.result[0], expected)
