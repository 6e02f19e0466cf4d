"""Weights applied several times, with a signal and halting: against the papers' loops over single tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixforge.search_space.model import LanguageModel
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.halting import PONDER, Recurrence
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.residual import Stack


def recurrence(text: str) -> tuple[LanguageModel, Recurrence]:
    model = parse(text).build(dtype=torch.float64)
    assert isinstance(model.stack, Stack)
    unit = model.stack.unit(0)
    assert isinstance(unit, Recurrence)
    torch.manual_seed(4)
    if unit.halting is not None:
        # Scores of all sizes, so that tokens halt at different times.
        unit.halting.score.weight.data.normal_(std=2.0)
        unit.halting.score.bias.data.fill_(-1.5)
    return model, unit


def expected(unit: Recurrence, x_BTD: Tensor, halts: bool, signal: bool) -> tuple[Tensor, list[int], Tensor]:
    """Graves 2016, equations 5 to 13, token by token; also each token's N and the mean of R."""
    batch, length, width = x_BTD.shape
    at = Pass(torch.arange(length), 0)
    state = x_BTD.clone()
    y = torch.zeros_like(x_BTD)
    total = torch.zeros(batch, length, dtype=torch.float64)
    ended = torch.zeros(batch, length, dtype=torch.int64)
    rest = torch.zeros(batch, length, dtype=torch.float64)
    for time in range(1, unit.times + 1):
        wave = torch.zeros(width, dtype=torch.float64)
        if signal:
            for j in range(width // 2):
                wave[2 * j] = math.sin(time / 10000 ** (2 * j / width))
                wave[2 * j + 1] = math.cos(time / 10000 ** (2 * j / width))
        read = state + wave
        given = unit.body(read, None, at)[0]
        if not halts:
            state = given
            continue
        assert unit.halting is not None
        for b in range(batch):
            for t in range(length):
                if ended[b, t]:
                    continue
                score = unit.halting.score.weight[0] @ read[b, t] + unit.halting.score.bias[0]
                p = 1 / (1 + math.exp(-float(score)))
                if total[b, t] + p > 0.99 or time == unit.times:
                    ended[b, t] = time
                    rest[b, t] = 1 - total[b, t]
                    y[b, t] += rest[b, t] * given[b, t]
                else:
                    total[b, t] += p
                    y[b, t] += p * given[b, t]
                state[b, t] = given[b, t]
    return (y if halts else state), ended.flatten().tolist(), rest.mean()


@pytest.mark.parametrize(
    ("words", "halts", "signal"), [("halt=act", True, False), ("halt=act, signal=step", True, True)]
)
@torch.no_grad()
def test_each_token_halts_by_itself(words: str, halts: bool, signal: bool) -> None:
    _, unit = recurrence(f"lm(reuse(attn + mlp, times=5, {words}), width=16)")
    x_BTD = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, ended, _ = expected(unit, x_BTD, halts, signal)
    assert len(set(ended)) >= 3
    torch.testing.assert_close(
        unit(x_BTD, None, Pass(torch.arange(9), 0))[0], y, atol=1e-6 if signal else 1e-12, rtol=1e-6
    )


@torch.no_grad()
def test_each_application_is_told_its_number() -> None:
    _, unit = recurrence("lm(reuse(attn + mlp, times=3, signal=step), width=16)")
    x_BTD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, _, _ = expected(unit, x_BTD, halts=False, signal=True)
    # The signal is kept in float32.
    torch.testing.assert_close(unit(x_BTD, None, Pass(torch.arange(5), 0))[0], y, atol=1e-6, rtol=1e-6)


def test_pondering_has_a_price_in_training_alone() -> None:
    """The gradient is that of the model's loss and of PONDER times the mean of N + R, in which N is constant."""
    model, unit = recurrence("lm(reuse(attn + mlp, times=4, halt=act), width=16)")
    assert unit.halting is not None
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64)
    score = unit.halting.score.weight

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, score)[0]

    plain = gradient(model.body(x_BTD).square().sum())
    model.train()
    priced = gradient(model.body(x_BTD).square().sum())
    # By differences: R of the whole sequence as the score's first weight moves.
    with torch.no_grad():
        ponder = []
        for move in (1e-6, -2e-6):
            score[0, 0] += move
            ponder.append(expected(unit, x_BTD, halts=True, signal=False)[2])
    slope = PONDER * (ponder[0] - ponder[1]) / 2e-6
    torch.testing.assert_close((priced - plain)[0, 0], slope, rtol=1e-4, atol=1e-8)


@torch.no_grad()
def test_adjacent_sharing_applies_each_block_twice() -> None:
    """Liu et al. 2024 (MobileLLM, arXiv 2402.14905), section 3.3: a block's weights are those of the block before."""
    shared = parse("lm(3 * (2 @ (attn(kv=gqa(1)) + swiglu)), width=64)")
    plain = parse("lm(6 * (attn(kv=gqa(1)) + swiglu), width=64)")
    model, deep = shared.build(dtype=torch.float64), plain.build(dtype=torch.float64)
    weights = model.state_dict()
    for name in deep.state_dict():
        if name.startswith("stack.units."):
            number, rest = name.removeprefix("stack.units.").split(".", 1)
            block, within = divmod(int(number), 2)
            weights[name] = model.state_dict()[f"stack.units.{block // 2}.units.{within}.{rest}"]
    deep.load_state_dict({name: weights[name] for name in deep.state_dict()})
    tokens = torch.randint(256, (2, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens), deep(tokens))
    assert shared.depth == plain.depth
    assert shared.cost(8).flops == plain.cost(8).flops
    inside = [each.cost(8).params - 256 * 64 - 64 for each in (shared, plain)]
    assert 2 * inside[0] == inside[1]
