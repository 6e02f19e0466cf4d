"""Mamba, S4D and FP-Mamba against their papers' recurrences as float64 loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.ssm import Ssm
from mixforge.search_space.parts.layer import Pass

WIDTH, LENGTH = 20, 23


def built(mixer: Ssm) -> tuple[torch.nn.Module, dict[str, Tensor], Tensor]:
    """The module, its weights drawn anew so that none is 0 or 1, and an input."""
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() == 1:
                weight += 0.3 * torch.randn_like(weight)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return module, weights, torch.randn(LENGTH, WIDTH, dtype=torch.float64)


def output(module: torch.nn.Module, x: Tensor) -> Tensor:
    y_BTD, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    return y_BTD[0].detach()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def convolved(w: dict[str, Tensor], branch: Tensor, t: int) -> Tensor:
    taps = w["conv.weight"].shape[1]
    total = w["conv.bias"].clone()
    for back in range(min(taps, t + 1)):
        total += w["conv.weight"][:, taps - 1 - back] * branch[t - back]
    return silu(total)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + 1e-6)


def selected(w: dict[str, Tensor], u: Tensor, state: int) -> tuple[Tensor, Tensor, Tensor]:
    """dt, B and C of one token: algorithm 2 of Mamba, with Jamba's norms where there are such."""
    rank = math.ceil(WIDTH / 16)
    low, b, c = (w["scan.selection.selection.weight"] @ u).split([rank, state, state])
    if "scan.selection.norms.0.weight" in w:
        low, b, c = (rms(part, w[f"scan.selection.norms.{n}.weight"]) for n, part in enumerate((low, b, c)))
    logit = w["scan.selection.step_size.weight"] @ low + w["scan.selection.bias"]
    return torch.log1p(torch.exp(logit)), b, c


@pytest.mark.parametrize(
    "mixer",
    [Ssm(), Ssm(norm="dt_b_c", state=5, expand=1.5), Ssm(gate="none", conv="none"), Ssm(conv=2)],
    ids=str,
)
def test_selective_block_is_algorithm_2_of_mamba(mixer: Ssm) -> None:
    module, w, x = built(mixer)
    inner = mixer.inner(WIDTH)
    u_z = x @ w["into.weight"].T
    a = -torch.exp(w["scan.selection.rate"])
    h = torch.zeros(inner, mixer.state, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        u = u_z[t, :inner] if mixer.conv == "none" else convolved(w, u_z[:, :inner], t)
        dt, b, c = selected(w, u, mixer.state)
        for f in range(inner):
            h[f] = torch.exp(dt[f] * a[f]) * h[f] + dt[f] * b * u[f]
        y = h @ c + w["scan.selection.skip"] * u
        if mixer.gate == "silu":
            y = y * silu(u_z[t, inner:])
        rows.append(w["out.weight"] @ y)
    torch.testing.assert_close(output(module, x), torch.stack(rows), rtol=1e-9, atol=1e-9)


def held_product(w: dict[str, Tensor], is_complex: bool) -> tuple[Tensor, Tensor, Tensor]:
    """exp(dt A), (exp(dt A) - 1) / A and C, all complex: equation 6 of S4D with B = 1 and zero-order hold."""
    dt = torch.exp(w["scan.step_size"])[:, None]
    real = -torch.exp(w["scan.rate"])
    a = torch.complex(real, w["scan.frequency"] if is_complex else torch.zeros_like(real))
    c = torch.complex(
        w["scan.weight"][..., 0], w["scan.weight"][..., 1] if is_complex else torch.zeros_like(real)
    )
    bar = torch.exp(dt * a)
    return bar, (bar - 1) / a, c


@pytest.mark.parametrize("poles", ["real", "complex"])
@pytest.mark.parametrize("gate", ["glu", "silu"])
def test_fixed_block_is_the_recurrence_of_s4d(poles: str, gate: str) -> None:
    mixer = Ssm(rule="s4d", poles=poles, gate=gate, state=6)
    module, w, x = built(mixer)
    inner = mixer.inner(WIDTH)
    bar, held, c = held_product(w, poles == "complex")
    u_z = x if gate == "glu" else x @ w["into.weight"].T
    h = torch.zeros_like(bar)
    rows = []
    for t in range(LENGTH):
        u = x[t] if gate == "glu" else convolved(w, u_z[:, :inner], t)
        h = bar * h + held * u[:, None]
        y = (c * h).sum(1).real * (2 if poles == "complex" else 1) + w["scan.skip"] * u
        if gate == "silu":
            rows.append(w["out.weight"] @ (y * silu(u_z[t, inner:])))
            continue
        left, right = (w["out.weight"] @ (y * (1 + torch.erf(y / math.sqrt(2))) / 2)).chunk(2)
        rows.append(left / (1 + torch.exp(-right)))
    torch.testing.assert_close(output(module, x), torch.stack(rows), rtol=1e-8, atol=1e-9)


def test_poles_start_where_s4d_lin_and_s4d_real_put_them() -> None:
    lin, real = (
        Ssm(rule="s4d", poles=poles).build(WIDTH, "torch").build().scan for poles in ("complex", "real")
    )
    torch.testing.assert_close(-lin.rate.exp(), torch.full((40, 8), -0.5))
    torch.testing.assert_close(lin.frequency[0], math.pi * torch.arange(8.0))
    torch.testing.assert_close(-real.rate.exp()[3], -torch.arange(1.0, 17))


def unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


def mixing_matrix(w: dict[str, Tensor], given: Tensor) -> Tensor:
    """Q of one token as a dense matrix."""
    k = unit(silu(w["scan.mixer.direction.weight"] @ given))
    alpha = torch.sigmoid(w["scan.mixer.strength.weight"] @ given + w["scan.mixer.strength.bias"])
    return torch.eye(k.shape[0], dtype=torch.float64) - 2 * alpha * torch.outer(k, k)


@pytest.mark.parametrize("iterations", [1, 3])
def test_fixed_point_iterates_the_scan_of_mixed_channels(iterations: int) -> None:
    mixer = Ssm(state=4, conv="none", fixed_point=Form("householder", (iterations,)))
    module, w, x = built(mixer)
    inner = mixer.inner(WIDTH)
    assert inner == 40
    u_z = x @ w["into.weight"].T
    a = -torch.exp(w["scan.selection.rate"])
    # One list of outputs for each iteration, the zeroth being zeros.
    y = torch.zeros(LENGTH, inner, dtype=torch.float64)
    for _ in range(iterations):
        h = torch.zeros(inner, 4, dtype=torch.float64)
        after = torch.zeros_like(y)
        for t in range(LENGTH):
            u = u_z[t, :inner]
            past = y[t - 1] if t > 0 else torch.zeros(inner, dtype=torch.float64)
            v = mixing_matrix(w, torch.cat([u, past])) @ (u - y[t]) + y[t]
            dt, b, c = selected(w, u, 4)
            b_fed, c_fed = (w["scan.fed_back.weight"] @ past).chunk(2)
            b, c = unit(b + b_fed), unit(c + c_fed)
            h = torch.exp(dt[:, None] * a) * h + (dt * v)[:, None] * b
            scanned = h @ c + w["scan.selection.skip"] * v
            centred = scanned - scanned.mean()
            after[t] = (
                centred / torch.sqrt((centred * centred).mean() + 1e-5) * w["scan.norm.weight"]
                + w["scan.norm.bias"]
            )
        y = after
    past_y = torch.cat([torch.zeros(1, inner, dtype=torch.float64), y[:-1]])
    gate = silu(u_z[:, inner:] + past_y @ w["scan.to_gate.weight"].T)
    torch.testing.assert_close(output(module, x), (y * gate) @ w["out.weight"].T, rtol=1e-8, atol=1e-8)


def test_illegal_genes_are_named() -> None:
    assert "even state" in str(Ssm(rule="s4d", state=3).why_illegal(WIDTH))
    assert "rule=s6" in str(Ssm(rule="s4d", fixed_point=Form("householder", (2,))).why_illegal(WIDTH))
    assert "leave norm out" in str(
        Ssm(norm="dt_b_c", fixed_point=Form("householder", (2,))).why_illegal(WIDTH)
    )
    assert "state=4" in str(Ssm(state=2, fixed_point=Form("householder", (2,))).why_illegal(WIDTH))


def test_published_block_has_the_published_weights() -> None:
    """Mamba-2.8B: 64 blocks of width 2560, each with 41.3 million weights beside its norm."""
    inner, rank = 5120, 160
    expected = (
        2560 * 2 * inner + inner * 5 + inner * (rank + 32) + rank * inner + inner + inner * 17 + inner * 2560
    )
    assert Ssm().cost(2560, 1).params == expected
