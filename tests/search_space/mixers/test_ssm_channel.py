"""The scan along channels: Mamba's recurrence over the segments of one token, from both ends, as a float64 loop."""

from __future__ import annotations

import torch
from torch import Tensor

from mixforge.search_space.mixers.ssm_channel import SsmChannel

WIDTH, SIZE, STATE = 24, 4, 3


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def mamba(w: dict[str, Tensor], segments: list[Tensor]) -> list[Tensor]:
    """Algorithm 2 of Mamba (arXiv 2312.00752) in its block, over segments in the place of tokens."""
    inner = 2 * SIZE
    rows = [w["into.weight"] @ segment for segment in segments]
    h, outputs = torch.zeros(inner, STATE, dtype=torch.float64), []
    for t, row in enumerate(rows):
        u = w["conv.bias"].clone()
        for back in range(min(4, t + 1)):
            u += w["conv.weight"][:, 3 - back] * rows[t - back][:inner]
        u = silu(u)
        low, b, c = (w["scan.selection.selection.weight"] @ u).split([1, STATE, STATE])
        dt = torch.log1p(torch.exp(w["scan.selection.step_size.weight"] @ low + w["scan.selection.bias"]))
        h = torch.exp(-dt[:, None] * torch.exp(w["scan.selection.rate"])) * h + (dt * u)[:, None] * b
        y = h @ c + w["scan.selection.skip"] * u
        outputs.append(w["out.weight"] @ (y * silu(row[inner:])))
    return outputs


@torch.no_grad()
def test_each_token_is_scanned_from_both_ends_of_its_channels() -> None:
    torch.manual_seed(0)
    module = SsmChannel(segment=SIZE, state=STATE).build(WIDTH, "torch").build().double()
    w = dict(module.named_parameters())
    ahead, back = (
        {name.removeprefix(f"{way}."): weight for name, weight in w.items() if name.startswith(f"{way}.")}
        for way in ("ahead", "back")
    )
    x_BTD = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    expected = torch.empty_like(x_BTD)
    for b in range(2):
        for t in range(3):
            segments = list(x_BTD[b, t].split(SIZE))
            forward, backward = mamba(ahead, segments), mamba(back, segments[::-1])[::-1]
            expected[b, t] = torch.cat([one + other for one, other in zip(forward, backward, strict=True)])
    torch.testing.assert_close(module(x_BTD), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module(x_BTD[:, 1]), expected[:, 1], rtol=1e-9, atol=1e-9)


def test_segments_that_do_not_divide_the_width_are_named() -> None:
    assert "legal: 1, 2, 3, 4, 6, 8, 12" in str(SsmChannel(segment=5).why_illegal(24))
    assert "two or more" in str(SsmChannel(segment=24).why_illegal(24))
