"""LSTM, GRU and sLSTM against their papers' equations as float64 loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixforge.evaluator.counting import count_flops
from mixforge.search_space.mixers.rnn import Rnn
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.layer import Pass

WIDTH, LENGTH = 24, 19


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def gate_inputs(mixer: Rnn, w: dict[str, Tensor], x: Tensor, t: int) -> list[Tensor]:
    """W x + b for each gate, all channels; the first two of what the convolution gives."""
    u, taps = x[t], mixer.taps()
    if taps > 1:
        total = sum(w["conv.weight"][:, taps - 1 - back] * x[t - back] for back in range(min(taps, t + 1)))
        assert isinstance(total, Tensor)
        u = total * sigmoid(total)
    heads, _ = mixer.sizes(WIDTH)
    found: list[Tensor] = []
    for name, seen in (("early", u), ("late", x[t])):
        rows = (w[f"{name}.weight"] @ seen + w[f"{name}.bias"]).view(heads, -1)
        gates = 2 if name == "early" else (1 if mixer.cell == "gru" else 2)
        found += [part.flatten() for part in rows.chunk(gates, 1)]
    return found


def from_output(mixer: Rnn, w: dict[str, Tensor], h: Tensor) -> list[Tensor]:
    """R h for each gate: block diagonal, one block for each head."""
    heads, dim = mixer.sizes(WIDTH)
    rows = torch.stack([h.view(heads, dim)[n] @ w["cell.recurrent"][n] for n in range(heads)])
    return [part.flatten() for part in rows.chunk(3 if mixer.cell == "gru" else 4, 1)]


def loop(mixer: Rnn, w: dict[str, Tensor], x: Tensor) -> Tensor:
    heads, dim = mixer.sizes(WIDTH)
    h = c = n = torch.zeros(heads * dim, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        given, own = gate_inputs(mixer, w, x, t), from_output(mixer, w, h)
        if mixer.cell == "gru":
            r, z = sigmoid(given[0] + own[0]), sigmoid(given[1] + own[1])
            new = torch.tanh(given[2] + r * (own[2] + w["cell.bias"].flatten()))
            h = (1 - z) * new + z * h
        else:
            i, f, g, o = (a + b for a, b in zip(given, own, strict=True))
            if mixer.cell == "lstm":
                c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
                h = sigmoid(o) * torch.tanh(c)
            else:
                # Without the stabiliser, which float64 does not need at this size.
                c = sigmoid(f) * c + torch.exp(i) * torch.tanh(g)
                n = sigmoid(f) * n + torch.exp(i)
                h = sigmoid(o) * c / n
        rows.append(h)
    found = torch.stack(rows)
    if mixer.cell == "slstm":
        blocks = found.view(LENGTH, heads, dim)
        centred = blocks - blocks.mean(2, keepdim=True)
        blocks = centred / torch.sqrt((centred * centred).mean(2, keepdim=True) + 1e-6)
        found = blocks.flatten(1) * w["norm.weight"]
    return found @ w["out.weight"].T


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer",
    [
        Rnn(cell="lstm"),
        Rnn(cell="lstm", heads=2, conv=3),
        Rnn(cell="gru"),
        Rnn(cell="gru", heads=3, head_dim=5),
        Rnn(cell="slstm", heads=4),
        Rnn(cell="slstm", conv="none", heads=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_block_is_the_papers_recurrence(mixer: Rnn, backend: str) -> None:
    torch.manual_seed(0)
    module = mixer.build(WIDTH, backend).build().double()  # type: ignore[arg-type]
    for weight in module.parameters():
        weight += 0.1 * torch.randn_like(weight)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    y_BTD, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(
        y_BTD[0], loop(mixer, dict(module.named_parameters()), x), rtol=1e-9, atol=1e-9
    )


@torch.no_grad()
def test_slstm_does_not_overflow() -> None:
    """Input gates of several hundred: e^i is no float32."""
    module = Rnn(cell="slstm", conv="none").build(WIDTH, "torch").build()
    module.early.weight *= 2000
    y_BTD, _ = module(torch.randn(1, 50, WIDTH), None, Pass(torch.arange(50), 0))
    assert torch.isfinite(y_BTD).all()


@pytest.mark.parametrize("word", ["lstm", "gru", "slstm"])
def test_the_counter_of_the_evaluator_sees_the_formula(word: str) -> None:
    architecture = parse(f"lm({word} + swiglu, width=24, vocab=11)")
    counted = count_flops(architecture.build(), torch.zeros(1, 13, dtype=torch.int64))
    assert counted == architecture.cost(13).flops


def test_an_lstm_compiles_as_one_graph() -> None:
    module = Rnn().build(WIDTH, "torch").build().double()
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at, before = Pass(torch.arange(LENGTH), 0, {}), module.initial_state(2, 0, x.device, x.dtype)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for actual, wanted in zip(compiled(x, before, at), module(x, before, at), strict=True):
        torch.testing.assert_close(actual, wanted)
