"""Training one candidate on one task: AdamW, warm-up and cosine, clipped gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.evaluation import Curve
from mixforge.evaluator.outcomes import Diverged
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.task import Batch

# A loss that stays this many times above where it began has left for good; it is looked at as a running
# mean, so that one bad batch is not taken for it.
_BLOWN_UP = 2.0
_CURVE_POINTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where a training is, for whoever watches."""

    task: str
    step: int
    """Steps done."""
    steps: int
    loss: float
    """Nats per predicted token of the last batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    curve: Curve
    tokens: int
    seconds: float


def train(
    candidate: Candidate,
    batches: Iterator[Batch],
    recipe: Recipe,
    *,
    task: str,
    rate: float,
    deadline: Deadline,
    progress: Callable[[Step], None] | None = None,
) -> Trained:
    """Train in place. Raises Diverged and TimedOut.

    `progress` is called after each step; what it raises ends the training.
    """
    candidate.train()
    device = str(next(candidate.parameters()).device)
    optimizer = _adamw(candidate, recipe, rate)
    losses: list[float] = []
    tokens = 0
    started = time.monotonic()
    running = first = math.nan
    for step in range(recipe.steps):
        deadline.check(f"training {task}, step {step} of {recipe.steps}")
        batch = next(batches).to(device)
        loss = _step(candidate, batch, optimizer, recipe, recipe.rate(step, rate))
        running = loss if step == 0 else 0.9 * running + 0.1 * loss
        first = loss if step == 0 else first
        if not math.isfinite(loss) or running > _BLOWN_UP * first:
            raise Diverged(
                f"loss {loss:.4g} at step {step + 1} of {recipe.steps} of {task}; it began at {first:.4g}"
            )
        losses.append(loss)
        tokens += batch.inputs_BT.numel()
        if progress is not None:
            progress(Step(task=task, step=step + 1, steps=recipe.steps, loss=loss))
    candidate.eval()
    return Trained(curve=thinned(task, losses), tokens=tokens, seconds=time.monotonic() - started)


def thinned(task: str, losses: list[float]) -> Curve:
    """A curve of at most a hundred points, each the mean of the losses since the point before."""
    size = max(1, math.ceil(len(losses) / _CURVE_POINTS))
    parts = [losses[first : first + size] for first in range(0, len(losses), size)]
    ends = [min(first + size, len(losses)) for first in range(0, len(losses), size)]
    return Curve(task=task, steps=tuple(ends), loss=tuple(sum(part) / len(part) for part in parts))


def _adamw(candidate: Candidate, recipe: Recipe, rate: float) -> torch.optim.AdamW:
    factors = {f"model.{name}": factor for name, factor in candidate.model.rate_factors.items()}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, weight in candidate.named_parameters():
        if weight.requires_grad:
            groups.setdefault((weight.dim() < 2, factors.get(name, 1.0)), []).append(weight)
    # The decay of a step is its rate times this number: where the rate is scaled, the decay stays what it is.
    return torch.optim.AdamW(
        [
            {
                "params": weights,
                "weight_decay": 0.0 if is_vector else recipe.weight_decay / factor,
                "factor": factor,
            }
            for (is_vector, factor), weights in sorted(groups.items(), key=lambda group: group[0])
        ],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def _step(
    candidate: Candidate, batch: Batch, optimizer: torch.optim.AdamW, recipe: Recipe, rate: float
) -> float:
    """One update.

    Returns the loss before it; NaN where a gradient is not finite, and then nothing is updated.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    loss = candidate.loss(batch.inputs_BT, batch.targets_BT)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(candidate.parameters(), recipe.clip)
    if not torch.isfinite(norm):
        return math.nan
    optimizer.step()
    return loss.item()
