"""Causal Fourier mixing as a float64 loop."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from mixforge.search_space.mixers.fourier import Fourier
from mixforge.search_space.parts.layer import Pass


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 5, 32])
def test_fourier_mixing_is_its_equation(window: int) -> None:
    width, length = 6, 17
    module = Fourier(window=window).build(width, "torch").build()
    x = torch.randn(length, width, dtype=torch.float64)
    y_BTD, _ = module(x[None], None, Pass(torch.arange(length), 0))
    for t in range(length):
        for d in range(width):
            total = 0j
            for s in range(max(0, t - window + 1), t + 1):
                time = cmath.exp(-2j * math.pi * (t % window) * (s % window) / window)
                total += time * sum(
                    x[s, e].item() * cmath.exp(-2j * math.pi * d * e / width) for e in range(width)
                )
            assert y_BTD[0, t, d].item() == pytest.approx(total.real / math.sqrt(window * width), abs=1e-10)


@torch.no_grad()
def test_the_last_token_of_a_window_is_that_of_fnet() -> None:
    """Re(F_seq(F_hidden(x))) of arXiv 2105.03824, whose last row sees the whole sequence."""
    x = torch.randn(13, 8, dtype=torch.float64)
    y_BTD, _ = Fourier(window=13).build(8, "torch").build()(x[None], None, Pass(torch.arange(13), 0))
    torch.testing.assert_close(y_BTD[0, -1], torch.fft.fft2(x, norm="ortho").real[-1])
