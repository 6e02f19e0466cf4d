"""The cells of `rec` against their papers' recurrences as float64 loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixforge.search_space.mixers.rec import Rec
from mixforge.search_space.model import build
from mixforge.search_space.notation import from_json, parse
from mixforge.search_space.parts.layer import Pass

WIDTH, LENGTH = 24, 29
Weights = dict[str, Tensor]


def output_and_loop(mixer: Rec, cell: Callable[[Rec, Weights, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What the module gives, and what the loop over the features and the block around it give."""
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    w = {name: weight.detach() for name, weight in module.named_parameters()}
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    y_BTD, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    h = cell(mixer, w, x)
    if "gate.weight" in w:
        seen = window(x, mixer.taps() if mixer.cell == "qrnn" else 1)
        h = gate(mixer.activation(), seen @ w["gate.weight"].T + w.get("gate.bias", torch.zeros(1))) * h
    if "norm.weight" in w:
        h = w["norm.weight"] * h / torch.sqrt((h * h).mean(1, keepdim=True) + 1e-6)
    y = h @ w["out.weight"].T + w.get("out.bias", torch.zeros(1))
    return y_BTD[0].detach(), y + w["skip"] * x if "skip" in w else y


def gate(name: str, z: Tensor) -> Tensor:
    return {
        "gelu": z * (1 + torch.erf(z / math.sqrt(2))) / 2,
        "gelu_tanh": z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
        "sigmoid": 1 / (1 + torch.exp(-z)),
        "silu": z / (1 + torch.exp(-z)),
    }[name]


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def window(x: Tensor, size: int) -> Tensor:
    """Each row behind the size - 1 before it, oldest first, zeros before the first."""
    rows = [torch.zeros(x.shape[1], dtype=x.dtype)] * (size - 1) + list(x)
    return torch.stack([torch.cat(rows[t : t + size]) for t in range(len(x))])


def convolved(w: Weights, x: Tensor) -> Tensor:
    """A depthwise convolution, where the module has one."""
    if "conv.weight" not in w:
        return x
    taps = w["conv.weight"].shape[1]
    shape, bias = (taps, x.shape[1]), w.get("conv.bias", torch.zeros(1))
    return torch.stack([(w["conv.weight"].T * row.view(shape)).sum(0) + bias for row in window(x, taps)])


def rglru(mixer: Rec, w: Weights, x: Tensor) -> Tensor:
    heads, dim = mixer.sizes(WIDTH)
    h, rows = torch.zeros(heads * dim, dtype=torch.float64), []
    for u in convolved(w, x @ w["into.weight"].T + w.get("into.bias", torch.zeros(1))):
        blocks = u.view(heads, dim)
        r, i = (
            sigmoid(
                torch.cat([blocks[n] @ w[f"cell.{name}.weight"][n] for n in range(heads)])
                + w[f"cell.{name}.bias"]
            )
            for name in ("recurrence_gate", "input_gate")
        )
        a = torch.exp(-8 * torch.log1p(torch.exp(w["cell.rate"])) * r)
        h = a * h + (torch.sqrt(1 - a * a) if rows else 1) * (i * u)
        rows.append(h)
    return torch.stack(rows)


def hgrn(mixer: Rec, w: Weights, x: Tensor) -> Tensor:
    heads, dim = mixer.sizes(WIDTH)
    size = heads * dim
    floor = 0.0 if mixer.floor is None else mixer.floor
    h, rows = torch.zeros(size, dtype=torch.complex128), []
    for u in convolved(w, x):
        logits = w["cell.gates.weight"] @ u + w["cell.gates.bias"]
        f = floor + (1 - floor) * sigmoid(logits[:size])
        c = gate("silu", logits[size:])
        if mixer.phase == "learned":
            value, turn = torch.complex(c[:size], c[size:]), torch.exp(1j * w["cell.angle"])
        else:
            value, turn = c.to(torch.complex128), torch.ones(size, dtype=torch.complex128)
        h = f * turn * h + (1 - f) * value
        rows.append(torch.cat([h.real, h.imag]) if mixer.phase == "learned" else h.real)
    return torch.stack(rows)


def lru(mixer: Rec, w: Weights, x: Tensor) -> Tensor:
    size = w["cell.nu"].shape[0]
    a = torch.exp(-torch.exp(w["cell.nu"]) + 1j * torch.exp(w["cell.theta"]))
    b = torch.complex(w["cell.gates.weight"][:size], w["cell.gates.weight"][size:])
    h, rows = torch.zeros(size, dtype=torch.complex128), []
    for u in convolved(w, x):
        h = a * h + torch.exp(w["cell.gamma"]) * (b @ u.to(torch.complex128))
        rows.append(torch.cat([h.real, h.imag]))
    return torch.stack(rows)


def qrnn(mixer: Rec, w: Weights, x: Tensor) -> Tensor:
    f, z = (window(x, mixer.taps()) @ w["cell.gates.weight"].T).chunk(2, 1)
    h, rows = torch.zeros(f.shape[1], dtype=torch.float64), []
    for t in range(LENGTH):
        h = sigmoid(f[t]) * h + (1 - sigmoid(f[t])) * torch.tanh(z[t])
        rows.append(h)
    return torch.stack(rows)


def mingru(mixer: Rec, w: Weights, x: Tensor) -> Tensor:
    h, rows = torch.zeros(w["out.weight"].shape[1], dtype=torch.float64), []
    for u in convolved(w, x):
        z, c = (w["cell.gates.weight"] @ u + w["cell.gates.bias"]).chunk(2)
        h = (1 - sigmoid(z)) * h + sigmoid(z) * c
        rows.append(h)
    return torch.stack(rows)


def minlstm(mixer: Rec, w: Weights, x: Tensor) -> Tensor:
    h, rows = torch.zeros(w["out.weight"].shape[1], dtype=torch.float64), []
    for u in convolved(w, x):
        f, i, c = (w["cell.gates.weight"] @ u + w["cell.gates.bias"]).chunk(3)
        total = sigmoid(f) + sigmoid(i)
        h = sigmoid(f) / total * h + sigmoid(i) / total * c
        rows.append(h)
    return torch.stack(rows)


LOOPS = {"hgrn": hgrn, "lru": lru, "mingru": mingru, "minlstm": minlstm, "qrnn": qrnn, "rglru": rglru}


@pytest.mark.parametrize(
    "mixer",
    [
        *(Rec(cell=cell) for cell in LOOPS),
        Rec(cell="rglru", heads=3),
        Rec(cell="rglru", heads=2, head_dim=5, conv="none"),
        Rec(cell="hgrn", floor=0.75, phase="none", conv=3),
        Rec(cell="hgrn", floor=0.25, head_dim=5, gate="silu"),
        Rec(cell="rglru", bias="all"),
        Rec(cell="rglru", bias="all", gate="gelu_tanh"),
        Rec(cell="lru", gate="gelu", conv=2, bias="all"),
        Rec(cell="qrnn", conv=3, gate="none"),
        Rec(cell="qrnn", conv="none"),
        Rec(cell="mingru", conv=4, gate="silu", head_dim=30),
    ],
    ids=str,
)
def test_block_is_the_papers_recurrence(mixer: Rec) -> None:
    found, expected = output_and_loop(mixer, LOOPS[mixer.cell])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_rglru_decay_starts_between_nine_tenths_and_one() -> None:
    module = Rec(cell="rglru").build(64, "torch").build()
    a = torch.exp(-8 * torch.nn.functional.softplus(module.cell.rate))
    assert a.min() >= 0.9
    assert a.max() < 1


def test_lru_starts_on_its_ring_with_hidden_values_of_the_inputs_size() -> None:
    cell = Rec(cell="lru").build(64, "torch").build().cell
    a = torch.exp(-torch.exp(cell.nu))
    assert a.min() >= 0.9
    assert a.max() < 1
    torch.testing.assert_close(torch.exp(cell.gamma), torch.sqrt(1 - a * a), rtol=1e-3, atol=1e-4)


def test_lower_bound_of_hgrn_rises_with_depth_unless_it_is_given() -> None:
    model = build(parse("lm(2 * (hgrn + attn + swiglu) + hgrn(floor=0.9) + hgrn, width=16)"))
    floors = [unit.mixer.cell.floor for unit in model.stack.units if hasattr(unit.mixer, "cell")]
    # Attention is a layer as well.
    assert floors == pytest.approx([0, 2 / 6, 0.9, 5 / 6])


@pytest.mark.parametrize(
    ("genes", "width", "said"),
    [
        ("head_dim=16384, heads=4", 64, "hgrn(heads=4, head_dim=16384)"),
        ("head_dim=32, heads=4", 64, "hgrn(heads=1, head_dim=128)"),
        ("head_dim=16384, heads=256", 64, "hgrn(heads=256, head_dim=16384)"),
        ("head_dim=16384", 32768, "hgrn(head_dim=16384)"),
    ],
)
def test_as_many_channels_as_one_head_cannot_have(genes: str, width: int, said: str) -> None:
    architecture = parse(f"lm(attn + rec({genes}), width={width})")
    assert said in str(architecture)
    assert architecture.why_illegal() is None
    assert from_json(architecture.canonical_json) == architecture


def test_genes_that_the_cell_does_not_have_are_dropped() -> None:
    text = "lm(rec(cell=qrnn, conv=2, gate=sigmoid, floor=0.5, heads=1) + rec(cell=rglru, conv=4), width=64)"
    assert str(parse(text)) == str(parse("lm(qrnn + rglru, width=64)"))
    assert str(parse("lm(rec(cell=lru, phase=none) + rglru(conv=none), width=64)")).startswith(
        "lm(lru + rglru(conv=none), "
    )
