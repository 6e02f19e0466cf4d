"""RWKV's channel mixing against its paper's equations, and its place in a model."""

from __future__ import annotations

import pytest
import torch

from mixforge.search_space.mixers.rwkv import ChannelMixing, Rwkv
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.layer import Pass

WIDTH, LENGTH = 12, 9


@torch.no_grad()
@pytest.mark.parametrize("mixer", [Rwkv(), Rwkv(receptance="none", expand=3.5)], ids=str)
def test_layer_is_the_papers_equations(mixer: Rwkv) -> None:
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double()
    w = dict(module.named_parameters())
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    expected = []
    for t in range(LENGTH):
        past = x[t - 1] if t > 0 else torch.zeros(WIDTH, dtype=torch.float64)
        mu = 1 - w["shift.share"][0]
        key = w["up.weight"] @ (mu * x[t] + (1 - mu) * past)
        y = w["out.weight"] @ torch.clamp(key, min=0) ** 2
        if mixer.receptance == "sigmoid":
            mu = 1 - w["shift.share"][1]
            y = y / (1 + torch.exp(-w["receptance.weight"] @ (mu * x[t] + (1 - mu) * past)))
        expected.append(y)
    y_BTD, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(expected))


@torch.no_grad()
def test_a_model_keeps_the_last_token_of_a_channel_mixer_that_looks_back() -> None:
    architecture = parse("lm(2 * (rwkv4 + rwkv) + (rwkv | attn), width=16, vocab=11)")
    model = architecture.build(dtype=torch.float64)
    assert isinstance(model.stack.units[1].mixer, ChannelMixing)
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    logits, state = model.prefill(tokens[:, :4], capacity=9)
    assert state.layers[1]["past"].shape == (2, 16)
    rows = [logits]
    for position in range(4, 9):
        logits, state = model.step(tokens[:, position], state)
        rows.append(logits)
    torch.testing.assert_close(torch.stack(rows, 1), model(tokens)[:, 3:], rtol=1e-9, atol=1e-9)


def test_it_is_no_token_mixer() -> None:
    assert "no layer mixes tokens" in str(parse("lm(4 * rwkv, width=16)").why_illegal())
