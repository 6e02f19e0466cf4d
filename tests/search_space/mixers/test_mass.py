"""Attention maps over hidden states against the mixer of A2Mamba, written out token by token and head by head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixforge.search_space.mixers.mass import Mass
from mixforge.search_space.parts.layer import Pass

WIDTH, HEADS, LENGTH = 24, 4, 23
DIM = WIDTH // HEADS


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary position of one head's channels."""
    half = DIM // 2
    out = x.clone()
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / DIM)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def convolved(w: Tensor, bias: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """Each channel over the last tokens, the newest at the right of the weights."""
    taps = w.shape[1]
    return [
        bias + sum(w[:, taps - 1 - back] * rows[t - back] for back in range(min(taps, t + 1)))
        for t in range(len(rows))
    ]


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    spread = torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    return (x - x.mean()) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def oracle(mixer: Mass, w: dict[str, Tensor], x: Tensor) -> Tensor:
    half, states = HEADS // 2, mixer.state
    q, k, v = ((x @ part.T).view(-1, HEADS, DIM) for part in w["qkv.weight"].chunk(3))

    def seen(head: int, t: int) -> list[int]:
        step = 1 if head < half else mixer.dilation
        return [t - step * n for n in range(mixer.window) if t - step * n >= 0]

    maps = [[{} for _ in range(HEADS)] for _ in range(LENGTH)]
    for t in range(LENGTH):
        for head in range(HEADS):
            query = turned(q[t, head], t)
            scores = {s: torch.exp(query @ turned(k[s, head], s) / math.sqrt(DIM)) for s in seen(head, t)}
            maps[t][head] = {s: score / sum(scores.values()) for s, score in scores.items()}

    def mapped(head: int, given: list[Tensor]) -> list[Tensor]:
        return [sum(weight * given[s] for s, weight in maps[t][head].items()) for t in range(LENGTH)]  # type: ignore[misc]

    said: list[list[Tensor]] = [mapped(head, list(v[:, head])) for head in range(half)]
    for head in range(half, HEADS):
        said.append(mapped(head, [said[head - half][t] + v[t, head] for t in range(LENGTH)]))
    rows = [torch.cat([said[head][t] for head in range(HEADS)]) for t in range(LENGTH)]
    u = [silu(row) for row in convolved(w["conv.weight"], w["conv.bias"], rows)]
    local = convolved(w["local.weight"], w["local.bias"], list(v.flatten(1)))

    rank = w["selection.step_size.weight"].shape[1]
    rates = -torch.exp(w["selection.rate"])
    hidden, readers, h = [], [], torch.zeros(WIDTH, states, dtype=torch.float64)
    for row in u:
        low, b, c = (w["selection.selection.weight"] @ row).split([rank, states, states])
        dt = torch.log(1 + torch.exp(w["selection.step_size.weight"] @ low + w["selection.bias"]))
        h = torch.exp(dt[:, None] * rates) * h + (dt * row)[:, None] * b
        hidden.append(h)
        readers.append(c)
    by_head = [[h.view(HEADS, DIM, states)[head] for h in hidden] for head in range(HEADS)]
    attended = [mapped(head, by_head[head]) for head in range(HEADS)]

    outputs = []
    for t in range(LENGTH):
        mixed = [
            sum(w["fuse.weight"][n, m] * attended[m][t] for m in range(HEADS)) + w["fuse.bias"][n]
            for n in range(HEADS)
        ]
        z = torch.cat([part @ readers[t] for part in mixed]) + w["selection.skip"] * u[t]  # type: ignore[operator]
        gated = (layer_norm(z, w, "norms.0") + local[t]) * silu(w["gate.weight"] @ x[t])
        outputs.append(w["out.weight"] @ layer_norm(gated, w, "norms.1"))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "mixer",
    [
        Mass(heads=HEADS, window=3, dilation=2),
        Mass(heads=HEADS, window=4, dilation=1, state=3, conv=3),
        Mass(heads=HEADS, window=30, dilation=5, state=2),
    ],
    ids=str,
)
@torch.no_grad()
def test_maps_mix_values_and_then_hidden_states(mixer: Mass) -> None:
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double()
    for weight in module.parameters():
        weight.add_(0.3 * torch.randn_like(weight))
    x_TD = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y_BTD[0], oracle(mixer, dict(module.named_parameters()), x_TD))


def test_heads_come_in_two_halves() -> None:
    for mixer, words in (
        (Mass(heads=3), "say 4"),
        (Mass(heads=10), "legal heads"),
        (Mass(heads=8), "even head_dim, not 3"),
    ):
        reason = mixer.why_illegal(WIDTH)
        assert reason is not None
        assert words in reason
    assert Mass().all_heads(96) == 6
    assert Mass(heads=2).canonical(64) == Mass()
