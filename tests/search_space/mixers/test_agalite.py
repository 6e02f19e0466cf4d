"""AGaLiTe as a float64 loop, and how near its banks of cosines come to the matrix that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixforge.search_space.mixers.agalite import Agalite, CosineBank
from mixforge.search_space.parts.layer import Pass

WIDTH, HEADS, DIM, FEATURES, LENGTH = 9, 2, 3, 2, 17


def made(cosines: int) -> tuple[CosineBank, Tensor]:
    torch.manual_seed(0)
    mixer = Agalite(heads=HEADS, head_dim=DIM, features=FEATURES, cosines=cosines)
    module: CosineBank = mixer.build(WIDTH, "torch").build().double()
    return module, torch.randn(LENGTH, WIDTH, dtype=torch.float64)


def of_head(module: CosineBank, x_D: Tensor, h: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """psi(q), psi(k), v, beta and gamma of one token."""
    row = module.made.weight @ x_D + module.made.bias
    q, k, v, b, g = row[: 5 * HEADS * DIM].view(HEADS, 5, DIM)[h]
    p_k, p_q, p_g = row[5 * HEADS * DIM :].view(HEADS, 3, FEATURES)[h]
    features = [torch.outer(p.relu(), y.relu()).flatten() for p, y in ((p_q, q), (p_k, k))]
    gamma = torch.outer(1 / (1 + torch.exp(-p_g)), 1 / (1 + torch.exp(-g))).flatten()
    return features[0], features[1], v, 1 / (1 + torch.exp(-b)), gamma


@pytest.mark.parametrize("cosines", [1, 2, 5])
@torch.no_grad()
def test_banks_of_cosines_are_the_papers(cosines: int) -> None:
    module, x_TD = made(cosines)
    keys = torch.zeros(HEADS, cosines, FEATURES * DIM, dtype=torch.float64)
    values = torch.zeros(HEADS, cosines, DIM, dtype=torch.float64)
    sums = torch.zeros(HEADS, FEATURES * DIM, dtype=torch.float64)
    rows = []
    for t, x_D in enumerate(x_TD):
        heads = []
        for h in range(HEADS):
            q, k, v, beta, gamma = of_head(module, x_D, h)
            for i in range(cosines):
                wave = math.cos((t + 2) * (-math.pi + 2 * math.pi * i / max(1, cosines - 1)))
                keys[h, i] = (1 - gamma) * keys[h, i] + wave * gamma * k
                values[h, i] = (1 - beta) * values[h, i] + wave * beta * v
            sums[h] = (1 - gamma) * sums[h] + gamma * k
            said = sum(values[h, i] * (keys[h, i] @ q) for i in range(cosines))
            assert isinstance(said, Tensor)
            heads.append(said / (2 * cosines * (sums[h] @ q) + 1e-5))
        rows.append(module.out.weight @ torch.cat(heads) + module.out.bias)
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_many_cosines_are_near_the_matrix_of_galite() -> None:
    """sum_i cos(w_i t) cos(w_i s) is R / 2 where t is s, and about 0 elsewhere: a quarter of the matrix is read."""
    module, x_TD = made(64)
    rows = []
    matrix = torch.zeros(HEADS, DIM, FEATURES * DIM, dtype=torch.float64)
    sums = torch.zeros(HEADS, FEATURES * DIM, dtype=torch.float64)
    for x_D in x_TD:
        heads = []
        for h in range(HEADS):
            q, k, v, beta, gamma = of_head(module, x_D, h)
            matrix[h] = torch.outer(1 - beta, 1 - gamma) * matrix[h] + torch.outer(beta * v, gamma * k)
            sums[h] = (1 - gamma) * sums[h] + gamma * k
            heads.append(matrix[h] @ q / (4 * (sums[h] @ q) + 1e-5))
        rows.append(module.out.weight @ torch.cat(heads))
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(LENGTH), 0))
    exact = torch.stack(rows)
    error = (y_BTD[0] - module.out.bias - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.1


def test_the_state_is_smaller_than_a_matrix() -> None:
    kept = Agalite(heads=1, head_dim=64, features=4, cosines=4).cost(64, 100).state_bytes
    assert kept == 4 * (4 * 4 * 64 + 4 * 64 + 4 * 64)
    assert 10 * kept < 4 * 4 * 64 * 64
