"""One architecture to its figures, and every way that can end."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from mixforge.evaluator.budget import Budget
from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.evaluate import evaluate
from mixforge.evaluator.evaluation import Evaluation, Outcome
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.task import Batch, HeldOut, Task
from mixforge.evaluator.tasks.copy import Copy
from mixforge.evaluator.tasks.mqar import Mqar
from mixforge.evaluator.tasks.selectiv import Selectiv
from mixforge.evaluator.tasks.state_tracking import StateTracking
from mixforge.evaluator.tasks.text import Text
from mixforge.evaluator.train import Step
from mixforge.evaluator.weights import load_weights
from mixforge.kernels.backend import BeyondKernels
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.notation import parse

_TINY = parse("lm(attn + mlp, width=16)")
_RECIPE = Recipe(steps=6, batch=4, lr=(3e-3,))


class _Faulty(nn.Module):
    """Stands where a candidate's own fault would: in the forward pass."""

    def __init__(self, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fault(x_BTD)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FaultyTask(Task):
    figure: ClassVar[str] = "recall"
    fault: Callable[[Tensor], Tensor]
    training: Recipe = _RECIPE
    vocab: int = 8

    def train_batches(self, seed: int) -> Iterator[Batch]:
        tokens_BT = torch.randint(8, (4, 5), generator=torch.Generator().manual_seed(seed))
        return itertools.repeat(Batch(tokens_BT, tokens_BT))

    def held_out(self, split: HeldOut) -> Iterator[Batch]:
        return itertools.islice(self.train_batches(0), 1)

    def score(self, candidate: Candidate, split: HeldOut, deadline: Deadline) -> float:
        return sum(float(candidate.loss(b.inputs_BT, b.targets_BT)) for b in self.held_out(split))

    def front(self, width: int) -> nn.Module:
        return _Faulty(self.fault)


def _end(fault: Callable[[Tensor], Tensor], deadline_s: float = 60.0) -> Evaluation:
    evaluation = evaluate(_TINY, Budget(tasks=(_FaultyTask(fault=fault),), deadline_s=deadline_s))
    assert evaluation.recall is None
    assert evaluation.params == _TINY.cost(1).params
    return evaluation


def _raise(error: Exception) -> Callable[[Tensor], Tensor]:
    def fault(x_BTD: Tensor) -> Tensor:
        raise error

    return fault


class _CompilationError(Exception):
    __module__ = "triton.compiler.errors"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Outcome.out_of_memory),
        (MemoryError("no room"), Outcome.out_of_memory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Outcome.out_of_memory),
        (_CompilationError("at 3:4: no such op"), Outcome.failed_to_compile),
        (RuntimeError("shapes do not match"), Outcome.crashed),
        (KeyError("x"), Outcome.crashed),
        (ValueError("x"), Outcome.crashed),
    ],
)
def test_what_is_raised_is_an_outcome(error: Exception, outcome: Outcome) -> None:
    evaluation = _end(_raise(error))
    assert evaluation.outcome is outcome
    assert evaluation.reason is not None
    assert str(error).splitlines()[0] in evaluation.reason
    assert evaluation.trace is not None
    assert "Traceback" in evaluation.trace


def test_what_no_kernel_takes_is_illegal_and_no_crash() -> None:
    evaluation = _end(_raise(BeyondKernels("q has 200 key channels; at most 128 in float32")))
    assert (evaluation.outcome, evaluation.trace) == (Outcome.illegal, None)
    assert evaluation.reason == "q has 200 key channels; at most 128 in float32"


def test_memory_that_is_not_there() -> None:
    evaluation = _end(lambda x_BTD: torch.empty(2**55))
    assert evaluation.outcome is Outcome.out_of_memory


def test_architecture_too_large_for_the_machine_is_not_tried() -> None:
    started = time.monotonic()
    evaluation = evaluate(
        parse("lm(200 * (attn + swiglu), width=32768)"), Budget(tasks=(Mqar(training=_RECIPE),))
    )
    assert evaluation.outcome is Outcome.out_of_memory
    assert "predicted" in (evaluation.reason or "")
    assert time.monotonic() - started < 5


def test_loss_that_is_no_number() -> None:
    evaluation = _end(lambda x_BTD: x_BTD * math.nan)
    assert evaluation.outcome is Outcome.diverged
    assert "step 1 of 6" in (evaluation.reason or "")


def test_loss_that_grows() -> None:
    huge = Recipe(steps=60, batch=4, lr=(10.0,), clip=1e9, warmup=0.0)
    task = Mqar(vocab=32, length=16, pairs=4, examples=8, training=huge)
    evaluation = evaluate(parse("lm(2 * (attn + mlp), width=16)"), Budget(tasks=(task,)))
    assert evaluation.outcome is Outcome.diverged
    assert "it began at" in (evaluation.reason or "")


def test_deadline_is_kept_between_steps() -> None:
    def slow(x_BTD: Tensor) -> Tensor:
        time.sleep(0.05)
        return x_BTD

    evaluation = _end(slow, deadline_s=0.1)
    assert evaluation.outcome is Outcome.timed_out
    assert "0.1 s" in (evaluation.reason or "")
    assert evaluation.train_s < 0.5


def test_illegal_architecture() -> None:
    illegal = parse("lm(attn(heads=5) + mlp, width=16)")
    assert illegal.why_illegal() is not None
    evaluation = evaluate(illegal, Budget(tasks=(Mqar(training=_RECIPE),)))
    assert evaluation.outcome is Outcome.illegal
    assert evaluation.reason == illegal.why_illegal()
    assert evaluation.trace is None
    assert evaluation.params == 0


def test_a_prefix_that_leaves_nothing_to_predict_is_told_before_training() -> None:
    tasks = (Mqar(training=_RECIPE, examples=8), Copy(training=_RECIPE, length=6, shortest=4, examples=8))
    budget, steps = Budget(tasks=tasks), list[Step]()
    for prefix, reason in (
        (
            10,
            "leaves nothing to predict in training sequences of copy, which have 13 tokens; say a shorter prefix",
        ),
        (24, "a prefix of 24 tokens leaves nothing to predict in training sequences of copy"),
    ):
        architecture = parse(f"lm(attn(mask=prefix({prefix})) + mlp, width=16)")
        evaluation = evaluate(architecture, budget, progress=steps.append)
        assert evaluation.outcome is Outcome.illegal
        assert reason in (evaluation.reason or "")
        assert not steps
    reason = budget.tasks[1].why_unasked(24) or ""
    assert (
        "of mqar, which have 24 tokens; say a shorter prefix, or longer sequences in [tasks.mqar]" in reason
    )
    assert budget.why_unasked(0) is budget.why_unasked(5) is None


def test_a_model_with_a_prefix_is_scored_on_every_task() -> None:
    tasks = (
        Copy(training=_RECIPE, length=6, shortest=4, examples=8),
        Mqar(training=_RECIPE, examples=8),
        Selectiv(
            training=_RECIPE, symbols=10, intruders_from=5, most_blanks=3, held_out_blanks=2, examples=8
        ),
        StateTracking(training=_RECIPE, length=12, held_out_length=16, examples=8),
        Text(training=_RECIPE, length=16, windows=4),
    )
    architecture = parse("lm(attn(mask=prefix(6)) + linear(init=prefix(3)), width=16)")
    evaluation = evaluate(architecture, Budget(tasks=tasks))
    assert evaluation.outcome is Outcome.ok, evaluation.reason
    for task in tasks:
        assert getattr(evaluation, task.figure) >= 0


def test_interrupt_is_not_an_outcome() -> None:
    def interrupted(x_BTD: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _end(interrupted)


def test_absent_device_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="'cuda' is not here; there is cpu"):
        evaluate(_TINY, Budget(tasks=()), "cuda")


def _tasks(tmp_path: Path, lr: tuple[float, ...] = (3e-3,)) -> tuple[Task, ...]:
    (tmp_path / "text").write_bytes(b"".join(b"line %d of many" % (n * n) for n in range(400)))
    recipe = dataclasses.replace(_RECIPE, lr=lr)
    return (
        Text(path=str(tmp_path / "text"), length=16, windows=8, training=recipe),
        Mqar(vocab=32, length=16, pairs=4, examples=16, training=recipe),
    )


def test_same_seed_same_data_weights_and_scores(tmp_path: Path) -> None:
    def run(seed: int, name: str) -> Evaluation:
        budget = Budget(tasks=_tasks(tmp_path), seed=seed)
        return evaluate(_TINY, budget, weights=tmp_path / name)

    torch.manual_seed(1)
    first = run(0, "first")
    torch.manual_seed(2)
    same = run(0, "same")
    other = run(1, "other")
    assert first.outcome is Outcome.ok
    assert dataclasses.replace(first, train_s=0.0, weights=None) == dataclasses.replace(
        same, train_s=0.0, weights=None
    )
    assert (tmp_path / "first").read_bytes() == (tmp_path / "same").read_bytes()
    assert first.curves != other.curves
    assert first.bits_per_byte != other.bits_per_byte


def test_scores_curves_and_costs_are_filled_in(tmp_path: Path) -> None:
    seen: list[Step] = []
    budget = Budget(tasks=_tasks(tmp_path), context=100)
    evaluation = evaluate(_TINY, budget, progress=seen.append)
    cost = _TINY.cost(100)
    assert (evaluation.params, evaluation.flops) == (cost.params, cost.flops)
    assert (evaluation.state_bytes, evaluation.decode_bytes) == (cost.state_bytes, cost.decode_bytes)
    assert 0 <= (evaluation.recall or 0) <= 1
    assert 0 < (evaluation.bits_per_byte or 0) < 8.5
    assert evaluation.bits_per_byte_test != evaluation.bits_per_byte
    assert [curve.task for curve in evaluation.curves] == ["mqar", "text"]
    assert evaluation.train_tokens == 6 * 4 * 16 * 2
    assert [(step.task, step.step) for step in seen] == [
        (task, step) for task in ("mqar", "text") for step in range(1, 7)
    ]
    assert evaluation.weights is None


def test_kept_weights_are_those_that_were_scored(tmp_path: Path) -> None:
    tasks = _tasks(tmp_path)
    evaluation = evaluate(_TINY, Budget(tasks=tasks), weights=tmp_path / "deep" / "w.safetensors")
    assert evaluation.weights == "w.safetensors"
    model = _TINY.build(seed=99)
    load_weights(model, tmp_path / "deep" / "w.safetensors")
    with torch.no_grad():
        again = tasks[0].score(Candidate(model, None), "selection", Deadline(60))
    assert again == pytest.approx(evaluation.bits_per_byte, rel=1e-6)


def test_best_of_several_rates_counts(tmp_path: Path) -> None:
    def bits(*lr: float) -> float:
        evaluation = evaluate(_TINY, Budget(tasks=_tasks(tmp_path, lr)[:1]))
        assert evaluation.bits_per_byte is not None
        return evaluation.bits_per_byte

    assert bits(1e-9, 3e-3) == bits(3e-3) < bits(1e-9)


def test_every_architecture_trains_on_the_same_data(tmp_path: Path) -> None:
    firsts = [next(_tasks(tmp_path)[1].train_batches(5)).inputs_BT for _ in range(2)]
    assert torch.equal(*firsts)


def test_evaluation_leaves_torch_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    architecture: Architecture = parse("lm(gdn + mlp, width=16)")
    evaluate(architecture, Budget(tasks=_tasks(tmp_path)))
    assert torch.equal(torch.rand(2), expected)
