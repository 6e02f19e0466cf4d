"""Attention as a loop over queries and keys in float64, for the tests of its genes to say what a paper changes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.parts.layer import Pass, TokenMixer

WIDTH, LENGTH = 24, 23


def built(mixer: Attn, width: int = WIDTH) -> tuple[TokenMixer, dict[str, Tensor]]:
    """The module in float64 with weights that are nowhere at their first values, and these weights by name."""
    assert mixer.why_illegal(width) is None, mixer.why_illegal(width)
    torch.manual_seed(0)
    module: TokenMixer = mixer.build(width, "torch").build().double().eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1 + 0.3 * torch.rand_like(weight)).add_(0.2 * torch.randn_like(weight))
    return module, dict(module.named_parameters())


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def at_once(module: TokenMixer, x_TD: Tensor) -> Tensor:
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(len(x_TD)), 0))
    return y_BTD[0]


@torch.no_grad()
def by_steps(module: TokenMixer, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    state = module.initial_state(1, len(x_TD), x_TD.device, x_TD.dtype)
    outputs = []
    for t in range(len(x_TD)):
        y_BD, state = module.step(x_TD[t : t + 1], state, Pass(torch.tensor([t]), 0))
        outputs.append(y_BD[0])
    return torch.stack(outputs), state


def agree(mixer: Attn, expected: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> None:
    """The module at once and by steps is what the paper says of its weights."""
    module, weights = built(mixer)
    x_TD = tokens()
    with torch.no_grad():
        wanted = expected(x_TD, weights)
    torch.testing.assert_close(at_once(module, x_TD), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_steps(module, x_TD)[0], wanted, rtol=1e-9, atol=1e-9)


def split(x_TF: Tensor, heads: int) -> Tensor:
    return x_TF.reshape(len(x_TF), heads, -1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def rotated(x_K: Tensor, angles: Tensor) -> Tensor:
    half = len(angles)
    number = torch.complex(x_K[:half], x_K[half : 2 * half]) * torch.exp(1j * angles)
    return torch.cat([number.real, number.imag, x_K[2 * half :]])


def rope(x_THK: Tensor, channels: int, theta: float = 10000.0) -> Tensor:
    """Su et al.: the first channels of every head, turned by t theta^(-2i/K)."""
    frequency = torch.tensor(
        [theta ** (-2 * i / channels) for i in range(channels // 2)], dtype=torch.float64
    )
    return torch.stack(
        [torch.stack([rotated(head, t * frequency) for head in row]) for t, row in enumerate(x_THK)]
    )


def every(t: int, s: int) -> bool:
    return s <= t


def nothing(z: Tensor, t: int, s: int, h: int) -> Tensor:
    return z


def softmax(z_S: Tensor, h: int) -> Tensor:
    return z_S.exp() / z_S.exp().sum()


def attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    score: Callable[[Tensor, int, int, int], Tensor] = nothing,
    sees: Callable[[int, int], bool] = every,
    weigh: Callable[[Tensor, int], Tensor] = softmax,
) -> Tensor:
    """[T, H * V]: for each query, weights of score(q . k / sqrt(K), t, s, h) over the keys that it sees."""
    length, heads, dim = q_THK.shape
    group = heads // k_THK.shape[1]
    rows = []
    for t in range(length):
        outputs = []
        for h in range(heads):
            seen = [s for s in range(length) if sees(t, s)]
            z = [score(q_THK[t, h] @ k_THK[s, h // group] / math.sqrt(dim), t, s, h) for s in seen]
            outputs.append(weigh(torch.stack(z), h) @ v_THV[seen, h // group])
        rows.append(torch.cat(outputs))
    return torch.stack(rows)


def projected(x_TD: Tensor, w: dict[str, Tensor], heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of plain projections."""
    return (
        split(x_TD @ w["queries.query.weight"].T, heads),
        split(x_TD @ w["memory.key.weight"].T, kv_heads),
        split(x_TD @ w["memory.value.weight"].T, kv_heads),
    )
