"""Memory as context against equations 21 to 25 of Titans, written out segment by segment and token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.mac import Mac
from mixforge.search_space.parts.layer import Pass

WIDTH, HEADS, DIM, LENGTH = 12, 2, 6, 14


def says(weights: list[Tensor], x: Tensor, residual: bool) -> Tensor:
    h = x
    for weight in weights[:-1]:
        h = F.gelu(weight @ h)
    h = weights[-1] @ h
    if not residual:
        return h
    return x + (h - h.mean()) / (((h - h.mean()) ** 2).mean() + 1e-6).sqrt()


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary position of one head's channels."""
    half = DIM // 2
    out = x.clone()
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / DIM)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def normed(x: Tensor) -> Tensor:
    return x / ((x**2).mean() + 1e-6).sqrt()


def asked(w: dict[str, Tensor], kind: int, x: Tensor) -> list[Tensor]:
    """Queries (0), keys (1) or values (2) of the memory, by heads."""
    p = w["learn.weight"].chunk(3)[kind] @ normed(x)
    rows = (p / (1 + torch.exp(-p))).view(HEADS, DIM)
    return list(rows if kind == 2 else rows / (rows**2).sum(1, keepdim=True).sqrt())


def recalled(w: dict[str, Tensor], memories: list[list[Tensor]], x: Tensor, residual: bool) -> Tensor:
    """W_r norm(M(q(x)))."""
    read = [says(memory, query, residual) for memory, query in zip(memories, asked(w, 0, x), strict=True)]
    return w["recall.weight"] @ torch.cat([normed(o) * w["norm.weight"] for o in read])


def oracle(mixer: Mac, w: dict[str, Tensor], x: Tensor) -> Tensor:
    residual = mixer.memory != "matrix"
    layers = sum(name.startswith("memory.first") for name in w)
    memories = [[w[f"memory.first.{i}"][head] for i in range(layers)] for head in range(HEADS)]
    surprises = [[torch.zeros_like(a) for a in memory] for memory in memories]
    keys_values = w["key_value.weight"].chunk(2)
    outputs = []
    for begin in range(0, LENGTH, mixer.segment):
        at_start = [[a.detach().requires_grad_() for a in memory] for memory in memories]
        segment = range(begin, min(begin + mixer.segment, LENGTH))
        context = {s: recalled(w, memories, x[s], residual) for s in segment}
        for t in segment:
            heads = []
            for head in range(HEADS):
                rows = slice(head * DIM, (head + 1) * DIM)
                keys, values = list(w["persistent"][0, head]), list(w["persistent"][1, head])
                for given in (context, x):
                    for s in range(begin, t + 1):
                        keys.append(turned(keys_values[0][rows] @ given[s], s))
                        values.append(keys_values[1][rows] @ given[s])
                query = turned(w["query.weight"][rows] @ x[t], t)
                weight = torch.exp(torch.stack(keys) @ query / math.sqrt(DIM))
                heads.append(weight / weight.sum() @ torch.stack(values))
            y = w["out.weight"] @ torch.cat(heads)
            gates = torch.sigmoid((w["gates.weight"] @ normed(y) + w["gates.bias"]).view(3, HEADS))
            for head, (key, value) in enumerate(zip(asked(w, 1, y), asked(w, 2, y), strict=True)):
                alpha, rate, eta = gates[:, head]
                theta = (1 - eta) * rate
                error = says(at_start[head], key, residual) - value
                slopes = torch.autograd.grad((error**2).sum() / 2, at_start[head])
                # No step goes past the value that it learns.
                reach = ((error**2).sum() / sum((g**2).sum() for g in slopes)).clamp(max=1).detach()
                slopes = [reach * g for g in slopes]
                surprises[head] = [eta * s - theta * g for s, g in zip(surprises[head], slopes, strict=True)]
                memories[head] = [
                    (1 - alpha) * a + s for a, s in zip(memories[head], surprises[head], strict=True)
                ]
            outputs.append(y * torch.sigmoid(recalled(w, memories, y, residual)))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "mixer",
    [
        Mac(heads=HEADS, segment=4, persistent=2, expand=2),
        Mac(heads=HEADS, segment=5, persistent=1, memory="matrix"),
        Mac(heads=HEADS, segment=30, persistent=3, memory=Form("mlp", (1,))),
    ],
    ids=str,
)
def test_attention_reads_the_memory_and_the_memory_learns_what_it_says(mixer: Mac) -> None:
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double()
    w = {name: weight.detach() for name, weight in module.named_parameters()}
    x_TD = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y_BTD[0], oracle(mixer, w, x_TD), rtol=1e-6, atol=1e-8)


def test_illegal_genes_are_named() -> None:
    for mixer, words in (
        (Mac(heads=5), "legal heads"),
        (Mac(heads=4), "a head_dim of 4 or more"),
        (Mac(heads=2, memory="matrix"), "even head_dim, not 5"),
    ):
        reason = mixer.why_illegal(10 if mixer.memory == "matrix" else WIDTH)
        assert reason is not None
        assert words in reason
