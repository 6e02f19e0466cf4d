"""Stacks whose units read more than the unit before: against their papers' sums, in float64."""

from __future__ import annotations

import torch

from mixforge.search_space.notation import parse
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.shortcut import ShortcutStack


def stack_of(text: str) -> ShortcutStack:
    stack = parse(text).build(dtype=torch.float64).stack
    assert isinstance(stack, ShortcutStack)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in stack.mix.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return stack


@torch.no_grad()
def test_each_unit_reads_an_average_of_all_depths() -> None:
    stack = stack_of("lm(2 * (attn + swiglu), width=16, shortcut=average)")
    weights = dict(stack.mix.named_parameters())
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64)
    at = Pass(torch.arange(5), 0)
    depths, read = [x_BTD], x_BTD
    for index in range(4):
        depths.append(stack.unit(index)(read, None, at)[0])
        alpha = weights[f"weights.{index}"]
        assert alpha.shape == (index + 2,)
        read = sum((a * x for a, x in zip(alpha, depths, strict=True)), torch.zeros_like(x_BTD))
    torch.testing.assert_close(stack(x_BTD, None, at)[0], read)


@torch.no_grad()
def test_shortcuts_begin_as_a_plain_stack() -> None:
    tokens = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(0))
    plain, averaged = (
        parse(f"lm(attn + swiglu, width=16{word})").build() for word in ("", ", shortcut=average")
    )
    torch.testing.assert_close(plain(tokens), averaged(tokens))


@torch.no_grad()
def test_the_last_depth_attends_to_all_depths_of_its_token() -> None:
    stack = stack_of("lm(attn + swiglu + mlp, width=64, shortcut=attention)")
    weights = dict(stack.mix.named_parameters())
    x_BTD = torch.randn(2, 3, 64, dtype=torch.float64)
    at = Pass(torch.arange(3), 0)
    depths, read = [x_BTD], x_BTD
    for index in range(3):
        read = stack.unit(index)(read, None, at)[0]
        depths.append(read)
    key, value = weights["memory.weight"].chunk(2)
    expected = read.clone()
    for b in range(2):
        for t in range(3):
            normed = [x[b, t] / torch.sqrt((x[b, t] ** 2).mean() + 1e-6) for x in depths]
            normed = [x * weights["norm.weight"] for x in normed]
            query = (weights["query.weight"] @ normed[-1]).reshape(2, 32)
            heads = []
            for h in range(2):
                keys = torch.stack([(key @ x).reshape(2, 32)[h] for x in normed])
                values = torch.stack([(value @ x).reshape(2, 32)[h] for x in normed])
                heads.append(torch.softmax(keys @ query[h] / 32**0.5, 0) @ values)
            expected[b, t] += weights["out.weight"] @ torch.cat(heads)
    torch.testing.assert_close(stack(x_BTD, None, at)[0], expected)
