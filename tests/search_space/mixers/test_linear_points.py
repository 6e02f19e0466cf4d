"""More named points of the linear family and its architectures' layers, each against its paper's recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_linear import HEADS, LENGTH, WIDTH, Weights, built, rms, sequence, sigmoid, silu, softplus
from torch import Tensor

from mixforge.search_space.genes import Form, GeneValue
from mixforge.search_space.mixers.linear import Linear
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.linear_points import POINTS

DIM = WIDTH // HEADS


def by_heads(rows: Tensor) -> Tensor:
    return rows.view(LENGTH, HEADS, -1)


def projected(w: Weights, x: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x @ w["mixed.weight"].T).split([HEADS * key_dim, HEADS * key_dim, HEADS * value_dim], 1)
    return by_heads(q), by_heads(k), by_heads(v)


def grouped(row_HV: Tensor, w: Weights) -> Tensor:
    """Layer norm of each head."""
    mean = row_HV.mean(1, keepdim=True)
    spread = ((row_HV - mean) ** 2).mean(1, keepdim=True)
    return (row_HV - mean) / torch.sqrt(spread + 1e-5) * w["output.norm.weight"] + w["output.norm.bias"]


def gated(rows: list[Tensor], w: Weights, x: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
    return (torch.stack(rows) * gate(x @ w["output.gate.weight"].T)) @ w["output.out.weight"].T


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def rotated(x_K: Tensor, t: int, frequency: Callable[[int, int], float]) -> Tensor:
    half = len(x_K) // 2
    angle = t * torch.tensor([frequency(i, half) for i in range(half)], dtype=torch.float64)
    number = torch.complex(x_K[:half], x_K[half:]) * torch.exp(1j * angle)
    return torch.cat([number.real, number.imag])


def gret(w: Weights, x: Tensor) -> Tensor:
    q, k, v = projected(w, x, DIM, DIM)
    gamma = sigmoid(x @ w["decay.logit.weight"].T + w["decay.logit.bias"]) ** (1 / 16)
    state, rows = zeros(HEADS, DIM, DIM), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            turn = [rotated(each[t, h], t, lambda i, half: 10000.0 ** (-i / half)) for each in (q, k)]
            state[h] = gamma[t, h] * state[h] + torch.outer(turn[1], v[t, h])
            heads.append(turn[0] @ state[h] / math.sqrt(DIM))
        rows.append(grouped(torch.stack(heads), w).flatten())
    return gated(rows, w, x, silu)


def lightning(w: Weights, x: Tensor) -> Tensor:
    """Layer 1 of 3: the decay of MiniMax, e^-slope with slope 2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5)."""
    q, k, v = (silu(each) for each in projected(w, x, DIM, DIM))
    state, rows = zeros(HEADS, DIM, DIM), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            slope = 2.0 ** (-8 * (h + 1) / HEADS) * (1 - 1 / (2 + 1e-5) + 1e-5)
            state[h] = math.exp(-slope) * state[h] + torch.outer(k[t, h], v[t, h])
            heads.append(q[t, h] @ state[h])
        rows.append(rms(torch.cat(heads), w["output.norm.weight"]))
    return gated(rows, w, x, sigmoid)


def hgrn2(w: Weights, x: Tensor) -> Tensor:
    """S = Diag(f) S + (1 - f) v^T, f = gamma + (1 - gamma) sigmoid(W x), here in layer 1 of 3."""
    q, v = (x @ w["mixed.weight"].T).split(WIDTH, 1)
    q, v = by_heads(silu(q)), by_heads(v)
    gamma = (1 + sigmoid(w["decay.bound"])) / 3
    f = by_heads(gamma + (1 - gamma) * sigmoid(x @ w["decay.up.weight"].T))
    state, rows = zeros(HEADS, DIM, DIM), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            state[h] = torch.diag(f[t, h]) @ state[h] + torch.outer(1 - f[t, h], v[t, h])
            heads.append(q[t, h] @ state[h] / math.sqrt(DIM))
        rows.append(rms(torch.cat(heads), w["output.norm.weight"]))
    return torch.stack(rows) @ w["output.out.weight"].T


def mlstm(w: Weights, x: Tensor, cap: Callable[[Tensor], Tensor] = lambda logit: logit) -> Tensor:
    """C = f C + i v k^T, n = f n + i k, h = C q / max(|n q|, 1), without the stabiliser."""
    q, k, v = projected(w, x, DIM // 2, DIM)
    k = k / math.sqrt(DIM // 2)
    f = sigmoid(cap(x @ w["decay.logit.weight"].T + w["decay.logit.bias"]))
    i = torch.exp(cap(x @ w["exp_gate.logit.weight"].T + w["exp_gate.logit.bias"]))
    memory, normaliser, rows = zeros(HEADS, DIM, DIM // 2), zeros(HEADS, DIM // 2), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            memory[h] = f[t, h] * memory[h] + i[t, h] * torch.outer(v[t, h], k[t, h])
            normaliser[h] = f[t, h] * normaliser[h] + i[t, h] * k[t, h]
            heads.append(memory[h] @ q[t, h] / max(abs(normaliser[h] @ q[t, h]), 1.0))
        rows.append(grouped(torch.stack(heads), w).flatten())
    return gated(rows, w, x, sigmoid)


def rwkv5(w: Weights, x: Tensor) -> Tensor:
    """lerp, then o = (S_{t-1} + diag(u) k v^T)^T r, S = diag(w) S_{t-1} + k v^T, w = exp(-exp(omega)) by channel."""
    back = torch.cat([zeros(1, WIDTH), x[:-1]]) - x
    inputs = [x + share * back for share in w["shift.share"]]
    r, k, v = (
        by_heads(each @ weight.T)
        for each, weight in zip(inputs[:3], w["mixed.weight"].split(WIDTH), strict=True)
    )
    state, rows = zeros(HEADS, DIM, DIM), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            kv = torch.outer(k[t, h], v[t, h])
            heads.append(r[t, h] @ (state[h] + torch.diag(w["bonus.weight"][h]) @ kv))
            state[h] = torch.diag(torch.exp(-torch.exp(w["decay.rate"][h]))) @ state[h] + kv
        rows.append(grouped(torch.stack(heads), w).flatten())
    return gated(rows, w, inputs[3], silu)


def rwkv6(w: Weights, x: Tensor) -> Tensor:
    """ddlerp, then o = (S_{t-1} + diag(u) k v^T)^T r, S = diag(w) S_{t-1} + k v^T, w = exp(-exp(d))."""
    back = torch.cat([zeros(1, WIDTH), x[:-1]]) - x
    low = torch.tanh((x + w["shift.lowrank.share"] * back) @ w["shift.lowrank.down.weight"].T)
    inputs = []
    for i, lora in enumerate(low.split(32, 1)):
        share = w["shift.share"][i] + lora @ w["shift.lowrank.up"][i]
        inputs.append(x + share * back)
    r, k, v = (
        by_heads(each @ weight.T)
        for each, weight in zip(inputs[:3], w["mixed.weight"].split(WIDTH), strict=True)
    )
    d = torch.tanh(inputs[3] @ w["decay.down.weight"].T) @ w["decay.up.weight"].T + w["decay.up.bias"]
    keep = by_heads(torch.exp(-torch.exp(d)))
    state, rows = zeros(HEADS, DIM, DIM), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            kv = torch.outer(k[t, h], v[t, h])
            heads.append(r[t, h] @ (state[h] + torch.diag(w["bonus.weight"][h]) @ kv))
            state[h] = torch.diag(keep[t, h]) @ state[h] + kv
        rows.append(grouped(torch.stack(heads), w).flatten())
    return gated(rows, w, inputs[4], silu)


def gateloop(w: Weights, x: Tensor) -> Tensor:
    """S = a S + k v^T with complex a = sigmoid(alpha) e^{i beta}, o = Re(q^T S)."""
    q, k, v = projected(w, x, DIM, DIM)
    alpha = sigmoid(x @ w["decay.up.weight"].T + w["decay.up.bias"])
    a = by_heads(alpha * torch.exp(1j * (x @ w["turn.angle.weight"].T)))
    state, rows = zeros(HEADS, DIM, DIM).to(torch.complex128), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            state[h] = a[t, h, :, None] * state[h] + torch.outer(k[t, h], v[t, h])
            heads.append(q[t, h] / math.sqrt(DIM) @ state[h].real)
        rows.append(grouped(torch.stack(heads), w).flatten())
    return gated(rows, w, x, silu)


def latte(w: Weights, x: Tensor) -> Tensor:
    """o_t = sum over latents l of softmax(q_t)_l sum_s softmax_{s <= t}(k_sl) v_s."""
    q, k, v = projected(w, x, DIM, DIM)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            of_time = torch.exp(k[: t + 1, h]) / torch.exp(k[: t + 1, h]).sum(0)
            of_latents = torch.exp(q[t, h]) / torch.exp(q[t, h]).sum()
            heads.append((of_time @ of_latents) @ v[: t + 1, h])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["output.out.weight"].T


def rodimus(w: Weights, x: Tensor) -> Tensor:
    """S = Diag(e^{-g tau}) S + (g^tau k) (sigmoid(...) u)^T, one head of 64 keys; the output adds d u."""
    inner = 2 * WIDTH
    mixed = x @ w["mixed.weight"].T
    taps = w["conv.weight"]
    padded = torch.cat([zeros(3, mixed.shape[1]), mixed])
    rows = [silu((padded[t : t + 4] * taps.T).sum(0) + w["conv.bias"]) for t in range(LENGTH)]
    q, k, u = torch.stack(rows).split([64, 64, inner], 1)
    g, tau = (x @ w["decay.up.weight"].T + w["decay.up.bias"]).split(64, 1)
    g, tau = softplus(g), sigmoid(tau)
    gate = x @ w["value_gate.down.weight"].T @ w["value_gate.up.weight"].T + w["value_gate.up.bias"]
    state, outputs = zeros(64, inner), []
    for t in range(LENGTH):
        key = k[t] / k[t].norm() * g[t] ** tau[t]
        state = torch.diag(torch.exp(-g[t] * tau[t])) @ state + torch.outer(key, sigmoid(gate[t]) * u[t])
        o = q[t] / q[t].norm() / math.sqrt(64) @ state + w["skip.weight"][0] * u[t]
        outputs.append(rms(o * silu(w["output.gate.weight"] @ x[t]), w["output.norm.weight"]))
    return torch.stack(outputs) @ w["output.out.weight"].T


MORE = [gret, lightning, hgrn2, mlstm, rwkv5, rwkv6, gateloop, latte, rodimus]


def output(mixer: Linear, x: Tensor) -> tuple[Tensor, Weights, torch.nn.Module]:
    module, weights = built(mixer)
    with torch.no_grad():
        y_BTD, _ = module(x[None], None, Pass(torch.arange(len(x)), 0))
    return y_BTD[0], weights, module


@torch.no_grad()
@pytest.mark.parametrize("oracle", MORE, ids=lambda oracle: oracle.__name__)
def test_alias_is_its_papers_recurrence(oracle: Callable[[Weights, Tensor], Tensor]) -> None:
    mixer = Linear(**Linear.aliases[oracle.__name__])
    if mixer.heads is None:
        mixer = replace(mixer, heads=HEADS)
    x_TD = sequence()
    y_TD, weights, _ = output(mixer.placed(1, 3), x_TD)
    torch.testing.assert_close(y_TD, oracle(weights, x_TD), rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_gate_cap_bends_the_logits_of_mlstms_gates() -> None:
    mixer = replace(Linear(**Linear.aliases["mlstm"]), heads=HEADS, gate_cap=2)
    x_TD = sequence()
    y_TD, weights, _ = output(mixer, x_TD)
    expected = mlstm(weights, x_TD, lambda logit: 2 * torch.tanh(logit / 2))
    torch.testing.assert_close(y_TD, expected, rtol=1e-7, atol=1e-7)
    assert (y_TD - mlstm(weights, x_TD)).abs().max() > 1e-3


def test_gate_cap_without_such_gates_is_dropped() -> None:
    assert Linear(gate_cap=15).canonical(WIDTH) == Linear().canonical(WIDTH)


@torch.no_grad()
def test_transnormer_turns_by_a_cosine_and_norms_without_weights() -> None:
    """sum_s gamma^{t-s} sum_c q_c k_c cos((t - s) theta_c) v_s, normed over all heads, times W x."""
    mixer = Linear(
        decay="layer",
        pos="lrpe",
        phi="silu",
        conv="none",
        out_norm="simple",
        out_gate="linear",
        heads=HEADS,
    )
    x = sequence()
    y, w, _ = output(mixer, x)
    q, k, v = projected(w, x, DIM, DIM)
    q, k = silu(q), silu(k)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            slope = 2.0 ** (-8 * (h + 1) / HEADS) * (1 + 1e-5)
            o = zeros(DIM)
            for s in range(t + 1):
                weight = (q[t, h] * k[s, h] * torch.cos((t - s) * w["turn.theta"][h])).sum()
                o = o + math.exp(-slope * (t - s)) * weight * v[s, h]
            heads.append(o)
        row = torch.cat(heads)
        rows.append(row / torch.sqrt((row * row).mean() + 1e-6))
    identity = torch.clone
    torch.testing.assert_close(y, gated(rows, w, x, identity), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_retnet_with_the_frequencies_of_its_code_and_group_norm() -> None:
    mixer = replace(Linear(**Linear.aliases["retnet"]), pos="xpos", out_norm="group", heads=HEADS)
    x = sequence()
    y, w, _ = output(mixer, x)
    q, k, v = projected(w, x, DIM, 2 * DIM)
    state, rows = zeros(HEADS, DIM, 2 * DIM), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            turn = [rotated(each[t, h], t, lambda i, half: 10000.0 ** (-i / (half - 1))) for each in (q, k)]
            state[h] = (1 - 2.0 ** (-5 - h)) * state[h] + torch.outer(turn[1], v[t, h])
            heads.append(turn[0] @ state[h] / math.sqrt(DIM))
        rows.append(grouped(torch.stack(heads), w).flatten())
    torch.testing.assert_close(y, gated(rows, w, x, silu), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_galite_gates_keys_and_values() -> None:
    """C = ((1-beta) (1-gamma)^T) * C + (beta v) (gamma psi(k))^T and s = (1-gamma) s + gamma psi(k)."""
    mixer = Linear(
        decay="both",
        forget=Form("sigmoid", (1,)),
        forget_rank="full",
        in_gate="tied",
        phi=Form("outer", (2,)),
        norm="denominator",
        conv="none",
        out_norm="none",
        out_gate="none",
        heads=HEADS,
    )
    x = sequence()
    y, w, _ = output(mixer, x)
    q, k, v = projected(w, x, DIM, DIM)
    features = []
    for each in (q, k):
        second = torch.relu(torch.einsum("thk,hkr->thr", each, w["feature.weight"]))
        features.append(torch.einsum("thk,thr->thkr", torch.relu(each), second).flatten(2) + 1e-3)
    # The module's logits are those of keeping, the paper's of writing.
    gamma = 1 - by_heads(sigmoid(x @ w["decay.up.weight"].T + w["decay.up.bias"]))
    beta = 1 - by_heads(sigmoid(x @ w["value_decay.up.weight"].T + w["value_decay.up.bias"]))
    memory, total, rows = zeros(HEADS, DIM, 2 * DIM), zeros(HEADS, 2 * DIM), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            key = gamma[t, h] * features[1][t, h]
            memory[h] = torch.outer(1 - beta[t, h], 1 - gamma[t, h]) * memory[h]
            memory[h] += torch.outer(beta[t, h] * v[t, h], key)
            total[h] = (1 - gamma[t, h]) * total[h] + key
            query = features[0][t, h] / math.sqrt(DIM)
            heads.append(memory[h] @ query / (total[h] @ query + 1e-6))
        rows.append(torch.cat(heads))
    torch.testing.assert_close(y, torch.stack(rows) @ w["output.out.weight"].T, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_heads_with_decays_of_both_kinds_may_share_a_key() -> None:
    genes = {"decay": "both", "heads": HEADS, "key_dim": DIM, "value_dim": DIM, "conv": "none"}
    shared, w = built(Linear(**genes, key_heads=1))  # type: ignore[arg-type]
    own, _ = built(Linear(**genes))  # type: ignore[arg-type]
    q, k, v = w["mixed.weight"].split([DIM, DIM, HEADS * DIM])
    own.load_state_dict({**w, "mixed.weight": torch.cat([*[q] * HEADS, *[k] * HEADS, v])})
    x_BTD, at = sequence()[None], Pass(torch.arange(LENGTH), 0)
    torch.testing.assert_close(shared(x_BTD, None, at)[0], own(x_BTD, None, at)[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_liger_makes_its_gate_of_its_keys() -> None:
    mixer = Linear(
        decay="channel",
        forget="key",
        phi="softmax",
        conv="none",
        out_norm="none",
        out_gate="none",
        heads=HEADS,
    )
    x = sequence()
    for by_channel in (True, False):
        y, w, _ = output(mixer if by_channel else replace(mixer, decay="scalar"), x)
        q, k, v = projected(w, x, DIM, DIM)
        logit = k if by_channel else k.mean(-1, keepdim=True).expand_as(k)
        state, rows = zeros(HEADS, DIM, DIM), []
        for t in range(LENGTH):
            for h in range(HEADS):
                keep = sigmoid(logit[t, h]) ** (1 / 16)
                state[h] = keep[:, None] * state[h] + torch.outer(k[t, h].softmax(0), v[t, h])
            rows.append(torch.cat([q[t, h].softmax(0) @ state[h] for h in range(HEADS)]))
        expected = torch.stack(rows) @ w["output.out.weight"].T
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_tied_gate_is_what_a_tempered_decay_forgets() -> None:
    """in_gate=tied is 1 - D_t for every decay; the gate g^tau of forget=tempered is in_gate=tempered alone."""
    x = sequence()
    y, w, _ = output(replace(PLAIN, decay="channel", forget="tempered", in_gate="tied"), x)
    q, k, v = projected(w, x, DIM, DIM)
    g, tau = (x @ w["decay.up.weight"].T + w["decay.up.bias"]).chunk(2, 1)
    keep = by_heads(torch.exp(-softplus(g) * sigmoid(tau)).clamp(min=math.exp(-5)))
    state, rows = zeros(HEADS, DIM, DIM), []
    for t in range(LENGTH):
        for h in range(HEADS):
            state[h] = keep[t, h, :, None] * state[h] + torch.outer((1 - keep[t, h]) * k[t, h], v[t, h])
        rows.append(torch.cat([q[t, h] / math.sqrt(DIM) @ state[h] for h in range(HEADS)]))
    torch.testing.assert_close(y, torch.stack(rows) @ w["output.out.weight"].T, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_cottention_divides_values_by_a_power_of_their_position() -> None:
    mixer = Linear(qk_norm="l2", norm="length", conv="none", out_norm="none", out_gate="none", heads=HEADS)
    x = sequence()
    y, w, _ = output(mixer, x)
    q, k, v = projected(w, x, DIM, DIM)
    q, k = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (q, k))
    rows = []
    for t in range(LENGTH):
        o = zeros(HEADS, DIM)
        for s in range(t + 1):
            scaled = v[s] / (s + 1) ** sigmoid(w["length_gate.power"])[:, None]
            o = o + (q[t] * k[s]).sum(-1, keepdim=True) * scaled
        rows.append(o.flatten())
    torch.testing.assert_close(y, torch.stack(rows) @ w["output.out.weight"].T, rtol=1e-9, atol=1e-9)


PLAIN = Linear(conv="none", out_norm="none", out_gate="none", heads=HEADS)


def weighted(w: Weights, weights_TSH: Tensor, v_THV: Tensor) -> Tensor:
    """Each token's sum of weighed values, through the output projection."""
    rows = [
        torch.einsum("sh,shv->hv", weights_TSH[t, : t + 1], v_THV[: t + 1]).flatten() for t in range(LENGTH)
    ]
    return torch.stack(rows) @ w["output.out.weight"].T


def series(z: Tensor, order: int) -> Tensor:
    total = torch.zeros_like(z)
    for i in range(order + 1):
        total = total + z**i / math.factorial(i)
    return total


@torch.no_grad()
@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_is_the_series_of_the_exponential(order: int) -> None:
    x = sequence()
    y, w, _ = output(replace(PLAIN, phi=Form("taylor", (order,)), key_dim=5), x)
    q, k, v = projected(w, x, 5, DIM)
    z = torch.einsum("thk,shk->tsh", q, k) / math.sqrt(5)
    torch.testing.assert_close(y, weighted(w, series(z, order), v), rtol=1e-9, atol=1e-9)


def learned_map(w: Weights, each: Tensor) -> Tensor:
    return torch.einsum("thk,hkf->thf", each, w["feature.weight"]) + w["feature.bias"]


def hedgehog(w: Weights, each: Tensor) -> Tensor:
    mapped = learned_map(w, each)
    both = torch.exp(torch.cat([mapped, -mapped], -1))
    return both / both.sum(-1, keepdim=True)


MAPS: dict[str, Callable[[Weights, Tensor], Tensor]] = {
    "silu": lambda w, each: silu(each),
    "exp": lambda w, each: torch.exp(each),
    "softmax": lambda w, each: torch.exp(each) / torch.exp(each).sum(-1, keepdim=True),
    "learned": lambda w, each: torch.relu(learned_map(w, each)),
    "hedgehog": hedgehog,
}


@torch.no_grad()
@pytest.mark.parametrize("phi", MAPS)
def test_feature_maps(phi: str) -> None:
    x = sequence()
    y, w, module = output(replace(PLAIN, phi=phi), x)
    q, k, v = projected(w, x, DIM, DIM)
    product = torch.einsum("thk,shk->tsh", MAPS[phi](w, q), MAPS[phi](w, k)) * module.scale
    assert module.scale == (1 if phi in ("softmax", "hedgehog") else DIM**-0.5)
    torch.testing.assert_close(y, weighted(w, product, v), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_performer_is_near_softmax_attention() -> None:
    """phi(q).phi(k) is the mean of exp(w.q' - |q'|^2/2) exp(w.k' - |k'|^2/2), whose expectation is exp(q.k/sqrt(K))."""
    x = sequence()
    y, w, module = output(replace(PLAIN, phi=Form("favor", (1024,)), norm="denominator"), x)
    q, k, v = projected(w, x, DIM, DIM)
    directions = module.feature.directions
    block = directions[:DIM] / directions[:DIM].norm(dim=1, keepdim=True)
    torch.testing.assert_close(block @ block.T, torch.eye(DIM, dtype=torch.float64), rtol=0, atol=1e-6)
    features = []
    for each in (q, k):
        scaled = each / DIM**0.25
        features.append(torch.exp(scaled @ directions.T - (scaled * scaled).sum(-1, keepdim=True) / 2))
    weights = torch.einsum("thm,shm->tsh", *features) / 1024
    total = torch.stack([weights[t, : t + 1].sum(0) for t in range(LENGTH)])
    torch.testing.assert_close(y, weighted(w, weights / (total[:, None] + 1e-6), v), rtol=1e-9, atol=1e-9)
    exact = torch.exp(torch.einsum("thk,shk->tsh", q, k) / math.sqrt(DIM))
    exact_total = torch.stack([exact[t, : t + 1].sum(0) for t in range(LENGTH)])
    near = weighted(w, exact / exact_total[:, None], v)
    assert (y - near).norm() < 0.25 * near.norm()


@torch.no_grad()
@pytest.mark.parametrize("phi", ["relu", "learned", Form("outer", (2,))])
def test_features_that_do_not_meet_are_no_cliff(phi: GeneValue) -> None:
    """Where a query and all keys have no feature in common, a rounding must not decide what is read."""
    mixer = Linear(phi=phi, norm="denominator", decay="scalar", forget="sigmoid", heads=8)  # type: ignore[arg-type]
    for seed in range(20):
        torch.manual_seed(seed)
        module = mixer.build(24, "torch").build().to(torch.bfloat16).eval()
        x = torch.randn(2, 13, 24).to(torch.bfloat16)
        y, _ = module(x, None, Pass(torch.arange(13), 0))
        exact, _ = module.double()(x.double(), None, Pass(torch.arange(13), 0))
        assert (y.double() - exact).norm() < 0.03 * exact.norm(), seed


@torch.no_grad()
def test_cosformer_weighs_by_the_cosine_of_the_distance() -> None:
    x = sequence()
    y, w, _ = output(replace(PLAIN, phi="relu", pos=Form("cosine", (64,)), norm="denominator"), x)
    q, k, v = projected(w, x, DIM, DIM)
    q, k = torch.relu(q) + 1e-3, torch.relu(k) + 1e-3
    weights = torch.einsum("thk,shk->tsh", q, k) / math.sqrt(DIM)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    weights = weights * torch.cos(math.pi / 2 * distance.double() / 64)[..., None]
    total = torch.stack([weights[t, : t + 1].sum(0) for t in range(LENGTH)])
    torch.testing.assert_close(y, weighted(w, weights / (total[:, None] + 1e-6), v), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_simplified_linear_attention_adds_a_convolution_of_its_values() -> None:
    """Guo et al. 2024: attention by relu features, and a filter of the values that all heads share."""
    x = sequence()
    y, w, _ = output(replace(PLAIN, phi="relu", norm="denominator", skip=Form("conv", (3,))), x)
    q, k, v = projected(w, x, DIM, DIM)
    q, k = torch.relu(q) + 1e-3, torch.relu(k) + 1e-3
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            weights = torch.stack([q[t, h] @ k[s, h] for s in range(t + 1)])
            o = weights / (weights.sum() + math.sqrt(DIM) * 1e-6) @ v[: t + 1, h]
            last = [w["local.weight"][:, 2 - back] * v[t - back, h] for back in range(min(3, t + 1))]
            heads.append(o + sum(last) + w["local.bias"])
        rows.append(torch.stack(heads).flatten())
    torch.testing.assert_close(y, torch.stack(rows) @ w["output.out.weight"].T, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_gates_of_what_is_written() -> None:
    """sigmoid and 1 - decay for each head, and the low-rank gate of the values; skip=channel before them."""
    x = sequence()
    given = replace(PLAIN, decay="scalar", forget=Form("sigmoid", (2,)), skip="channel", value_gate=3)
    for in_gate in ("sigmoid", "tied"):
        y, w, _ = output(replace(given, in_gate=in_gate), x)
        q, k, v = projected(w, x, DIM, DIM)
        keep = torch.sqrt(sigmoid(x @ w["decay.logit.weight"].T + w["decay.logit.bias"]))
        write = 1 - keep
        if in_gate == "sigmoid":
            write = sigmoid(x @ w["write_gate.logit.weight"].T + w["write_gate.logit.bias"])
        low = x @ w["value_gate.down.weight"].T
        value = by_heads(sigmoid(low @ w["value_gate.up.weight"].T + w["value_gate.up.bias"])) * v
        state, rows = zeros(HEADS, DIM, DIM), []
        for t in range(LENGTH):
            for h in range(HEADS):
                state[h] = keep[t, h] * state[h] + write[t, h] * torch.outer(k[t, h], value[t, h])
            read = torch.stack([q[t, h] / math.sqrt(DIM) @ state[h] for h in range(HEADS)])
            rows.append((read + w["skip.weight"] * v[t]).flatten())
        expected = torch.stack(rows) @ w["output.out.weight"].T
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_lerp_gives_each_projection_its_own_mix_of_two_tokens() -> None:
    x = sequence()
    y, w, _ = output(replace(PLAIN, shift="lerp", out_gate="sigmoid", gate_rank=2), x)
    back = torch.cat([zeros(1, WIDTH), x[:-1]]) - x
    inputs = [x + share * back for share in w["shift.share"]]
    q, k, v = (
        by_heads(each @ weight.T)
        for each, weight in zip(inputs, w["mixed.weight"].split(WIDTH), strict=False)
    )
    weights = torch.einsum("thk,shk->tsh", q, k) / math.sqrt(DIM)
    rows = [torch.einsum("sh,shv->hv", weights[t, : t + 1], v[: t + 1]).flatten() for t in range(LENGTH)]
    gate = (
        inputs[3] @ w["output.gate.down.weight"].T @ w["output.gate.up.weight"].T + w["output.gate.up.bias"]
    )
    expected = (torch.stack(rows) * sigmoid(gate)) @ w["output.out.weight"].T
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_values_of_the_first_layer_are_blended_into_those_of_a_later_one() -> None:
    x = sequence()
    owner, owned = built(replace(PLAIN, values="own"))
    reader, w = built(replace(PLAIN, values="shared"))
    at = Pass(torch.arange(LENGTH), 0)
    owner(x[None], None, at)
    y_BTD, _ = reader(x[None], None, at)
    _, _, first = projected(owned, x, DIM, DIM)
    q, k, v = projected(w, x, DIM, DIM)
    low = x @ w["blend.gate.down.weight"].T
    share = by_heads(sigmoid(low @ w["blend.gate.up.weight"].T + w["blend.gate.up.bias"]))
    weights = torch.einsum("thk,shk->tsh", q, k) / math.sqrt(DIM)
    expected = weighted(w, weights, (1 - share) * v + share * first)
    torch.testing.assert_close(y_BTD[0], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_learned_first_state_is_read_and_noise_only_in_training() -> None:
    x = sequence()
    module, w = built(replace(PLAIN, decay="head", init="learned"))
    w["first.weight"].copy_(torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(5)))
    at = Pass(torch.arange(LENGTH), 0)
    q, k, v = projected(w, x, DIM, DIM)
    state, rows = w["first.weight"].clone(), []
    for t in range(LENGTH):
        for h in range(HEADS):
            state[h] = (1 - 2.0 ** (-5 - h)) * state[h] + torch.outer(k[t, h], v[t, h])
        rows.append(torch.cat([q[t, h] / math.sqrt(DIM) @ state[h] for h in range(HEADS)]))
    y_BTD, _ = module(x[None], None, at)
    torch.testing.assert_close(y_BTD[0], torch.stack(rows) @ w["output.out.weight"].T, rtol=1e-9, atol=1e-9)
    noisy, _ = built(replace(PLAIN, init=Form("noise", (0.5,))))
    plain, _ = built(PLAIN)
    noisy.eval()
    assert torch.equal(noisy(x[None], None, at)[0], plain(x[None], None, at)[0])
    noisy.train()
    assert not torch.equal(noisy(x[None], None, at)[0], plain(x[None], None, at)[0])


def prefix_linear_attention(w: Weights, x: Tensor, prefix: int) -> Tensor:
    """Arora et al. 2024 (arXiv 2407.05483), section 4.2: two sums, of the prefix by its own keys and values and of the
    tokens so far, over their joint denominator; phi(q) . phi(k) = 1 + z + z^2 / 2 with z = q . k / sqrt(K)."""
    q, k, v = projected(w, x, 16, DIM)
    k_e, v_e = (by_heads(x @ w[f"prefix.{name}.weight"].T)[:prefix] for name in ("key", "value"))
    rows = []
    for t in range(LENGTH):
        for h in range(HEADS):
            z = torch.cat([k_e[:, h], k[: t + 1, h]]) @ q[t, h] / 4
            weights = 1 + z + z * z / 2
            rows.append(weights @ torch.cat([v_e[:, h], v[: t + 1, h]]) / (weights.sum() + 1e-6))
    return torch.stack(rows).view(LENGTH, -1) @ w["output.out.weight"].T


def test_a_prefix_writes_the_first_state_with_projections_of_its_own() -> None:
    x, at = sequence(), Pass(torch.arange(LENGTH), 0)
    for prefix in (9, LENGTH, 60):
        module, w = built(replace(Linear(**POINTS["based"]), heads=HEADS, init=Form("prefix", (prefix,))))
        y_BTD, expected = module(x[None], None, at)[0], prefix_linear_attention(w, x, prefix)
        torch.testing.assert_close(y_BTD[0], expected, rtol=1e-9, atol=1e-9)
        names, weights = zip(*w.items(), strict=True)
        cast = sequence(5)
        wanted = torch.autograd.grad((expected * cast).sum(), weights)
        for name, one, other in zip(
            names, torch.autograd.grad((y_BTD[0] * cast).sum(), weights), wanted, strict=True
        ):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8, msg=name)


@torch.no_grad()
def test_what_follows_the_first_pass_is_no_prefix() -> None:
    x = sequence()
    module, w = built(replace(Linear(**POINTS["based"]), heads=HEADS, init=Form("prefix", (9,))))
    for cuts in ((0, 9, LENGTH), (0, 20, LENGTH), (0, 4, 6, LENGTH)):
        state = module.initial_state(1, LENGTH, x.device, x.dtype)
        outputs = []
        for start, end in pairwise(cuts):
            y_BTD, state = module(x[None, start:end], state, Pass(torch.arange(start, end), start))
            outputs.append(y_BTD[0])
        expected = prefix_linear_attention(w, x, min(9, cuts[1]))
        torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_prefix_stands_before_any_recurrence() -> None:
    """S_0 of unit keys turned by their positions, then the gated delta rule from it on."""
    mixer = replace(PLAIN, rule="delta", decay="scalar", pos="rope", key_heads=1, init=Form("prefix", (9,)))
    module, w = built(mixer)
    x = sequence()
    q, k, v = (x @ w["mixed.weight"].T).split([DIM, DIM, WIDTH], 1)
    k_e, v_e = (x[:9] @ w[f"prefix.{name}.weight"].T for name in ("key", "value"))
    rate, step = w["decay.rate"].exp(), softplus(x @ w["decay.step_size.weight"].T + w["decay.bias"])
    strength = sigmoid(x @ w["beta.logit.weight"].T)

    def key(row: Tensor, t: int) -> Tensor:
        turned = rotated(row, t, lambda i, half: 10000.0 ** (-i / half))
        return turned / torch.sqrt((turned * turned).sum() + 1e-6)

    rows = []
    for h in range(HEADS):
        part = slice(h * DIM, (h + 1) * DIM)
        state = sum(torch.outer(key(k_e[j], j), v_e[j, part]) for j in range(9))
        outputs = []
        for t in range(LENGTH):
            state = torch.exp(-rate[h] * step[t, h]) * state
            state = state + strength[t, h] * torch.outer(key(k[t], t), v[t, part] - key(k[t], t) @ state)
            outputs.append(key(q[t], t) / math.sqrt(DIM) @ state)
        rows.append(torch.stack(outputs))
    y_BTD, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    expected = torch.cat(rows, 1) @ w["output.out.weight"].T
    torch.testing.assert_close(y_BTD[0], expected, rtol=1e-9, atol=1e-9)


def test_training_goes_on_from_the_last_sequence_of_the_batch_before() -> None:
    mixer = replace(PLAIN, decay="head", init="carry")
    module, w = built(mixer)
    at = Pass(torch.arange(LENGTH), 0)
    batches = torch.stack([torch.stack([sequence(), sequence(7)]), torch.stack([sequence(8), sequence(9)])])
    state, expected = torch.zeros(HEADS, DIM, DIM, dtype=torch.float64), []
    for batch in batches:
        first, outputs = state, []
        for x in batch:
            q, k, v = projected(w, x, DIM, DIM)
            state, rows = first.clone(), []
            for t in range(LENGTH):
                for h in range(HEADS):
                    state[h] = (1 - 2.0 ** (-5 - h)) * state[h] + torch.outer(k[t, h], v[t, h])
                rows.append(torch.cat([q[t, h] / math.sqrt(DIM) @ state[h] for h in range(HEADS)]))
            outputs.append(torch.stack(rows) @ w["output.out.weight"].T)
        expected.append(torch.stack(outputs))
    module.train()
    module(batches[0], None, at)[0].sum().backward()
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    y_BTD, _ = module(batches[1], None, at)
    torch.testing.assert_close(y_BTD, expected[1], rtol=1e-9, atol=1e-9)
    # No gradient of the batch before, whose graph is gone.
    y_BTD.sum().backward()
    again, _ = built(mixer)
    again.load_state_dict(kept)
    assert torch.equal(again.train()(batches[1], None, at)[0], y_BTD)
    # After training, and for a sequence that is decoded, the first state is zero.
    plain, _ = built(replace(mixer, init="zero"))
    assert torch.equal(again.eval()(batches[0], None, at)[0], plain(batches[0], None, at)[0])


@pytest.mark.parametrize(
    "text", ["2 @ (gla(init=carry) + mlp)", "segment(gla(init=carry), length=8, memory=1)"]
)
def test_layers_that_are_applied_again_do_not_go_on_from_the_batch_before(text: str) -> None:
    reason = parse(f"lm({text}, width=64)").why_illegal()
    assert reason is not None
    assert (
        "gla(init=carry): training goes on from the batch before, so it is applied once in a pass" in reason
    )


def test_the_stabiliser_keeps_float32_where_the_plain_recurrence_overflows() -> None:
    """Input gates of e^100: the paper's memory overflows float32, e^-m S does not."""
    mixer = replace(Linear(**Linear.aliases["mlstm"]), heads=HEADS)
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build()
    with torch.no_grad():
        module.exp_gate.logit.bias.fill_(100)
    x = sequence().float()
    at = Pass(torch.arange(LENGTH), 0)
    y_BTD, _ = module(x[None], None, at)
    expected, _ = module.double()(x[None].double(), None, at)
    torch.testing.assert_close(y_BTD, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alias", Linear.aliases)
def test_gradients_in_float32_are_those_of_float64(alias: str) -> None:
    mixer = Linear(**Linear.aliases[alias])
    gradients = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        module = mixer.build(WIDTH, "torch").build().to(dtype)
        y_BTD, _ = module(sequence()[None].to(dtype), None, Pass(torch.arange(LENGTH), 0))
        (y_BTD * sequence().flip(0).to(dtype)).sum().backward()
        gradients.append({name: weight.grad.double() for name, weight in module.named_parameters()})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() < 1e-4 * (expected.norm() + 0.1), name


@torch.no_grad()
def test_phases_of_a_long_sequence_do_not_drift() -> None:
    """A turn that is read in one pass of 4,000 tokens equals one that is read token by token, in float32."""
    mixer = replace(Linear(**Linear.aliases["gateloop"]), heads=HEADS)
    torch.manual_seed(0)
    turn = mixer.build(WIDTH, "torch").build().turn
    x = torch.randn(1, 4_000, WIDTH, generator=torch.Generator().manual_seed(1)) + 3
    _, last = turn(x, torch.arange(4_000), None)
    state = turn.initial_state(1, torch.device("cpu"), torch.float32)
    for part in x.split(500, 1):
        _, state = turn(part, torch.arange(500), state)
    torch.testing.assert_close(torch.cos(state), torch.cos(last), rtol=0, atol=1e-5)
    exact = (x.double() @ turn.angle.weight.double().T).sum(1).view(1, HEADS, -1)
    torch.testing.assert_close(torch.cos(last).double(), torch.cos(exact), rtol=0, atol=1e-3)


@torch.no_grad()
def test_lower_bounds_and_decays_rise_with_the_layer() -> None:
    hgrn2 = Linear(**Linear.aliases["hgrn2"])
    lightning = Linear(**Linear.aliases["lightning"])
    least, kept = [], []
    for layer in range(4):
        bounded = hgrn2.placed(layer, 4).build(WIDTH, "torch").build().decay
        x = torch.full((1, 1, WIDTH), -50.0)
        bounded.up.weight.fill_(1)
        least.append(bounded(x, x[..., None, :])[0].exp().min().item())
        kept.append(
            lightning.placed(layer, 4).build(WIDTH, "torch").build().decay(x, x)[0].exp().min().item()
        )
    assert least == sorted(least)
    assert least[3] == pytest.approx(0.75, abs=0.01)
    assert kept == sorted(kept)
    assert kept[3] == pytest.approx(1, abs=1e-4)


def test_a_place_is_no_gene_and_no_identity() -> None:
    mixer = Linear(decay="layer")
    assert mixer.placed(2, 5) == mixer
    assert hash(mixer.placed(2, 5)) == hash(mixer)
    assert mixer.placed(2, 5).place == (2, 5)
    assert mixer.place == (0, 1)


SIGMOID = Form("sigmoid", (1,))


@pytest.mark.parametrize(
    ("genes", "words"),
    [
        ({"norm": "max1", "rule": "delta"}, "norm=max1 needs rule=add"),
        ({"norm": "denominator", "phi": Form("taylor", (3,))}, "or taylor(2)"),
        ({"norm": "denominator", "phi": "relu", "pos": "phase"}, "pos=phase turns them"),
        ({"decay": "both", "rule": "delta"}, "decay=both needs rule=add"),
        ({"skip": "bonus", "rule": "delta"}, "skip=bonus reads the state before"),
        ({"skip": "bonus", "key": "latent"}, "skip=bonus reads the state before"),
        ({"in_gate": "exp"}, "in_gate=exp has no bound"),
        ({"in_gate": "exp", "norm": "max1", "decay": "channel"}, "one scale for each head"),
        ({"in_gate": "tied"}, "in_gate=tied is 1 - decay"),
        ({"in_gate": "tied", "decay": "channel", "rule": "delta"}, "keys of length 1: say rule=add"),
        ({"in_gate": "tempered", "decay": "channel"}, "in_gate=tempered belongs to"),
        ({"decay": "scalar", "forget": "tempered"}, "forget=tempered needs decay=channel"),
        ({"decay": "both", "forget": "key"}, "no decay of the values"),
        ({"decay": "channel", "forget": "key", "phi": "hedgehog"}, "say decay=scalar or a map"),
        ({"key": "forget"}, "key=forget takes its keys from decay=channel"),
        ({"key": "forget", "decay": "channel", "forget": "key"}, "each follow from the other"),
        ({"key": "forget", "decay": "channel", "forget": SIGMOID, "in_gate": "tied"}, "a gate in its keys"),
        ({"key": "forget", "decay": "channel", "key_heads": 1, "heads": 3}, "leave key_heads out"),
        ({"key": "forget", "decay": "channel", "pos": "rope"}, "does not rotate"),
        ({"key": "latent", "decay": "head"}, "key=latent makes keys and decay"),
        ({"key": "latent", "qk_norm": "l2"}, "weights that sum to 1"),
        ({"phi": Form("taylor", (3,)), "key_dim": 512}, "features of key_dim 512"),
    ],
)
def test_illegal_genes_are_named(genes: dict[str, int | str | Form], words: str) -> None:
    reason = Linear(**genes).why_illegal(WIDTH)  # type: ignore[arg-type]
    assert reason is not None
    assert words in reason


def test_canonical_drops_what_says_nothing() -> None:
    given = Linear(
        decay="channel",
        forget=Form("sigmoid", (16,)),
        forget_rank=16,
        act="silu",
        out_gate="none",
        gate_rank=3,
        heads=3,
    )
    assert given.canonical(24) == Linear(decay="channel", forget="sigmoid", out_gate="none", heads=3)
    given = Linear(conv="none", bias="conv", act="none", forget_rank=5, out_norm="joint", heads=1)
    assert given.canonical(24) == Linear(conv="none")
    assert Linear(out_norm="joint", out_gate="none", heads=3).canonical(24).out_norm == "gated"


def test_values_that_no_layer_reads_are_not_lent() -> None:
    mixer = Linear(values="own", heads=3)
    assert list(mixer.lends(24)) == ["values"]
    assert mixer.unread(frozenset({"values"})) == Linear(heads=3)
    assert Linear(values="shared", heads=3).borrows(24) == mixer.lends(24)


@pytest.mark.parametrize(
    ("genes", "says"),
    [
        (
            {"rule": "delta", "phi": Form("taylor", (3,)), "levels": "log"},
            "at most 256 key channels with rule=delta and levels=log",
        ),
        (
            {"rule": "dplr", "key_dim": 300, "heads": 1},
            "at most 256 key channels with rule=dplr, and this mixer has 300",
        ),
        ({"decay": "both", "key_dim": 300, "heads": 1}, "at most 256 key channels with decay=both"),
        (
            {"rule": Form("slots", (4,)), "decay": "channel", "key_dim": 160, "heads": 1},
            r"at most 128 key channels with rule=slots\(4\)",
        ),
    ],
)
def test_what_triton_cannot_run_is_refused(genes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Linear(**genes).build(24, "triton")


@torch.no_grad()
def test_layers_of_a_model_share_values_and_know_their_place() -> None:
    text = "lm(3 * (linear(decay=layer, values={}) + swiglu), width=32)"
    first = "linear(decay=layer, values=own) + swiglu"
    later = "2 * (linear(decay=layer, values=shared) + swiglu)"
    model = parse(f"lm({first} + {later}, width=32)").build().double()
    tokens_BT = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    whole_BTX = model(tokens_BT)
    logits_BX, state = model.prefill(tokens_BT[:, :9], capacity=17)
    torch.testing.assert_close(logits_BX, whole_BTX[:, 8], rtol=1e-9, atol=1e-9)
    for t in range(9, 17):
        logits_BX, state = model.step(tokens_BT[:, t], state)
        torch.testing.assert_close(logits_BX, whole_BTX[:, t], rtol=1e-9, atol=1e-9)
    factors = [unit.mixer.decay.factor for unit in model.stack.units[::2]]
    assert factors == pytest.approx([1, 0.5, 0], abs=1e-4)
    assert "the same mixer with values=own" in str(parse(text.format("shared")).why_illegal())
    # What no layer reads is not lent, and so is no other model.
    assert parse(text.format("own")) == parse(text.format("plain"))


@torch.no_grad()
def test_latents_whose_keys_jump_are_off_by_no_more_than_the_floor_of_the_decay() -> None:
    """A key that outweighs all before it by more than 148 to 1 leaves 0.7 % of what they wrote, and not less."""
    module, w = built(replace(Linear(**Linear.aliases["latte"]), heads=HEADS))
    w["mixed.weight"][WIDTH : 2 * WIDTH] *= 20
    x = sequence()
    y_BTD, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    latents = latte({**w, "output.out.weight": torch.eye(WIDTH, dtype=torch.float64)}, x)
    off = (torch.linalg.lstsq(w["output.out.weight"], y_BTD[0].T).solution.T - latents).abs().max()
    largest = projected(w, x, DIM, DIM)[2].abs().max()
    assert 1e-6 * largest < off < 2 * math.exp(-5) * largest
