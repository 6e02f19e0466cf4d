"""Segments with memory tokens against the paper's equations."""

from __future__ import annotations

import torch
from torch import Tensor

from mixforge.search_space.notation import parse
from mixforge.search_space.parts.associative_segment import AssociativeSegments
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.residual import Stack
from mixforge.search_space.parts.segment import SegmentStack


@torch.no_grad()
def test_memory_goes_from_segment_to_segment() -> None:
    """Bulatov et al. 2022, equations 5 and 6: [H_read; H; H_write] = Transformer([M; x; M]), M' = H_write."""
    model = parse("lm(segment(attn + swiglu + gdn + mlp, length=6, memory=2), width=16)").build(
        dtype=torch.float64
    )
    assert isinstance(model.stack, Stack)
    unit = model.stack.unit(0)
    assert isinstance(unit, SegmentStack)
    assert isinstance(unit.body, Stack)
    x_BTD = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    memory = unit.memory.expand(2, 2, 16)
    outputs = []
    for begin in (0, 6, 12, 18):
        segment = x_BTD[:, begin : begin + 6]
        hidden = torch.cat([memory, segment, memory], 1)
        for index in unit.body.order:
            hidden = unit.body.unit(index)(hidden, None, Pass(torch.arange(hidden.shape[1]), 0))[0]
        outputs.append(hidden[:, 2:-2])
        memory = hidden[:, -2:]
    torch.testing.assert_close(model.body(x_BTD), torch.cat(outputs, 1))


@torch.no_grad()
def test_only_the_memory_passes_a_boundary() -> None:
    """Between two segments nothing but the memory tokens carries what was read; and it does."""
    model = parse("lm(segment(attn + mlp, length=4, memory=2), width=16)").build(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (1, 12), generator=generator)
    changed = tokens.clone()
    changed[:, 1] = (tokens[:, 1] + 1) % 256
    first, second = model(tokens), model(changed)
    assert not torch.allclose(first[:, 8:], second[:, 8:], atol=1e-9)
    assert isinstance(model.stack, Stack)
    state = model.initial_state(1, 12)
    kept = {name: tensor.shape for layer in state.layers for name, tensor in layer.items()}
    # Four tokens and twice the memory, however long the sequence is.
    assert kept == {"memory": (1, 2, 16), "key": (1, 1, 8, 16), "value": (1, 1, 8, 16)}


def test_the_first_segment_learns_from_the_last() -> None:
    model = parse("lm(segment(attn + mlp, length=4, memory=2), width=16)").build(dtype=torch.float64)
    x_BTD = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    model.body(x_BTD)[:, -1].sum().backward()
    assert x_BTD.grad is not None
    assert (x_BTD.grad[0, :4].abs().sum(-1) > 0).all()


def products(x: Tensor) -> Tensor:
    """The features of one key: entries of [relu(x), relu(-x)] times those 1, 2 and 3 places before, normed."""
    both = [max(float(each), 0.0) for each in x] + [max(-float(each), 0.0) for each in x]
    found = [both[i] * both[i - shift] for shift in (1, 2, 3) for i in range(len(both))]
    features = torch.tensor(found, dtype=torch.float64)
    return features / features.norm().clamp_min(1e-12)


@torch.no_grad()
def test_each_block_has_an_associative_memory() -> None:
    """Rodkin et al. 2024, equations 1 to 6, key by key."""
    text = "lm(segment(attn + mlp + gdn, length=5, memory=3, carry=associative(4)), width=16)"
    model = parse(text).build(dtype=torch.float64)
    assert isinstance(model.stack, Stack)
    unit = model.stack.unit(0)
    assert isinstance(unit, AssociativeSegments)
    assert len(unit.blocks) == 2
    generator = torch.Generator().manual_seed(0)
    for index in range(2):
        weight = unit.block(index).value.weight
        assert not weight.any()
        weight.copy_(torch.randn(16, 16, generator=generator, dtype=torch.float64) / 4)
    x_BTD = torch.randn(1, 17, 16, generator=generator, dtype=torch.float64)
    matrices = [torch.zeros(24, 16, dtype=torch.float64) for _ in range(2)]
    norms = [torch.zeros(24, dtype=torch.float64) for _ in range(2)]
    outputs = []
    for begin in range(0, 17, 5):
        segment = x_BTD[0, begin : begin + 5]
        hidden = torch.cat([segment, unit.memory])
        for index in range(2):
            block, matrix, norm = unit.block(index), matrices[index], norms[index]
            read = []
            for x in hidden:
                query = products(block.query.weight @ x)
                read.append(x + matrix.T @ query / (norm @ query + 1e-5))
            given = torch.stack(read)[None]
            hidden = block.body(given, None, Pass(torch.arange(given.shape[1]), 0))[0][0]
            change, more = torch.zeros_like(matrix), torch.zeros_like(norm)
            for y in hidden[-3:]:
                key = products(block.key.weight @ y)
                strength = torch.sigmoid(block.strength.weight[0] @ y + block.strength.bias[0])
                before = matrix.T @ key / (norm @ key + 1e-5)
                change += strength * torch.outer(key, block.value.weight @ y - before)
                more += torch.clamp(1 - norm @ key / key.square().sum(), 0, 1) * key
            matrices[index], norms[index] = matrix + change, norm + more
        outputs.append(hidden[: len(segment)])
    torch.testing.assert_close(model.body(x_BTD)[0], torch.cat(outputs))
