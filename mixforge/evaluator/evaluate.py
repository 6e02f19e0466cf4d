"""One architecture to its figures: `evaluate(architecture, budget, device) -> Evaluation`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mixforge.evaluator.budget import Budget
from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluation import FIGURES, Curve, Evaluation, Outcome
from mixforge.evaluator.memory import check_room
from mixforge.evaluator.outcomes import Diverged, Illegal, attempt
from mixforge.evaluator.seeds import seed_for
from mixforge.evaluator.task import HeldOut, Task
from mixforge.evaluator.train import Step, train
from mixforge.evaluator.weights import save_weights
from mixforge.search_space.architecture import Architecture


@dataclass(slots=True)
class _Findings:
    """What is known so far; kept when a later task fails."""

    scores: dict[str, float] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    tokens: int = 0
    weights: str | None = None


def evaluate(
    architecture: Architecture,
    budget: Budget,
    device: str = "cpu",
    *,
    weights: Path | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Evaluation:
    """Train an architecture on every task of a budget and score it. One outcome or another, it returns.

    weights: the file to keep the weights of the model that learned text in; none are kept without it.
    progress: called after every training step.
    The costs of an illegal architecture are 0. Raises ValueError where the device is not there.
    """
    where = environment(device)
    started = time.monotonic()
    found = _Findings()
    failure = attempt(lambda: _run(architecture, budget, device, found, weights, progress))
    cost = None if architecture.why_illegal() is not None else architecture.cost(budget.context)
    scores = found.scores if failure is None else {}
    return Evaluation(
        outcome=Outcome.ok if failure is None else failure.outcome,
        reason=None if failure is None else failure.reason,
        trace=None if failure is None else failure.trace,
        context=budget.context,
        params=0 if cost is None else cost.params,
        flops=0 if cost is None else cost.flops,
        state_bytes=0 if cost is None else cost.state_bytes,
        decode_bytes=0 if cost is None else cost.decode_bytes,
        bits_per_byte=scores.get("bits_per_byte"),
        bits_per_byte_test=scores.get("bits_per_byte_test"),
        recall=scores.get("recall"),
        recall_test=scores.get("recall_test"),
        copying=scores.get("copying"),
        copying_test=scores.get("copying_test"),
        tracking=scores.get("tracking"),
        tracking_test=scores.get("tracking_test"),
        selectivity=scores.get("selectivity"),
        selectivity_test=scores.get("selectivity_test"),
        train_tokens=found.tokens,
        train_s=time.monotonic() - started,
        curves=tuple(found.curves),
        backend=budget.backend,
        seed=budget.seed,
        environment=where,
        weights=found.weights if failure is None else None,
    )


def _run(
    architecture: Architecture,
    budget: Budget,
    device: str,
    found: _Findings,
    weights: Path | None,
    progress: Callable[[Step], None] | None,
) -> None:
    reason = architecture.why_illegal() or budget.why_unasked(architecture.prefix)
    if reason is not None:
        raise Illegal(reason)
    deadline = Deadline(budget.deadline_s)
    for task in budget.tasks:
        best = _best(architecture, task, budget, device, deadline, found, progress)
        found.curves.append(best.curve)
        found.scores[task.figure] = best.score
        found.scores[f"{task.figure}_test"] = _score(best.candidate, task, "test", deadline)
        if weights is not None and task.keeps_weights:
            about = {"architecture": str(architecture), "digest": architecture.digest, "task": task.name}
            save_weights(best.candidate.model, weights, about)
            found.weights = weights.name


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A trained candidate, its curve and its score on the selection split."""

    candidate: Candidate
    curve: Curve
    score: float


def _best(
    architecture: Architecture,
    task: Task,
    budget: Budget,
    device: str,
    deadline: Deadline,
    found: _Findings,
    progress: Callable[[Step], None] | None,
) -> _Attempt:
    """Train at each of the task's rates from the same weights on the same data; the best on the selection
    split.

    Raises Diverged where every rate diverged.
    """
    sign = 1 if FIGURES[task.figure].better == "higher" else -1
    attempts: list[_Attempt] = []
    reasons: list[str] = []
    for rate in task.training.lr:
        candidate = build_candidate(architecture, task, budget, device)
        batches = task.train_batches(seed_for(budget.seed, task.name, "train"))
        try:
            done = train(
                candidate,
                batches,
                task.training,
                task=task.name,
                rate=rate,
                deadline=deadline,
                progress=progress,
            )
            attempts.append(_Attempt(candidate, done.curve, _score(candidate, task, "selection", deadline)))
            found.tokens += done.tokens
        except Diverged as error:
            reasons.append(f"{error} (lr {rate:g})")
    if not attempts:
        raise Diverged("; ".join(reasons))
    return max(attempts, key=lambda each: sign * each.score)


def build_candidate(architecture: Architecture, task: Task, budget: Budget, device: str) -> Candidate:
    """The model with the task's vocabulary and the task's front, with weights from the budget's seed."""
    fitted = architecture.replace(vocab=task.vocab)
    check_room(fitted.cost(1).params, device)
    # What the grammar's rules let through and a module refuses is illegal all the same.
    try:
        model = fitted.build(budget.backend, seed_for(budget.seed, task.name, "weights"), device)
    except ValueError as error:
        raise Illegal(str(error)) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(budget.seed, task.name, "front"))
        front = task.front(architecture.width)
    return Candidate(model, front).to(device)


@torch.no_grad()
def _score(candidate: Candidate, task: Task, split: HeldOut, deadline: Deadline) -> float:
    score = task.score(candidate, split, deadline)
    if not math.isfinite(score):
        raise Diverged(f"the {split} score of {task.name} is {score}")
    return score
