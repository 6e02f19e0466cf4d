"""Rules of the linear family beyond adding and the delta rule, each against its paper's recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_linear import (
    HEADS,
    LENGTH,
    ORACLES,
    WIDTH,
    Weights,
    built,
    convolved,
    rms,
    sequence,
    sigmoid,
    silu,
    softplus,
    unit,
)
from test_linear_points import DIM, MORE, by_heads, gated, grouped, projected, zeros
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.linear import Linear
from mixforge.search_space.parts.layer import Pass


def back_of(x: Tensor) -> Tensor:
    """The token before each, zeros before the first."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def rwkv7(w: Weights, x: Tensor, first: Tensor | None = None) -> Tensor:
    """S_t = S_{t-1} (diag(w) - kappa^T (a kappa)) + v^T k, in the paper's rows: S [V, K]."""
    q_in, k_in, v_in, d_in, a_in, g_in = (x + mu * (back_of(x) - x) for mu in w["shift.share"])
    to_r, to_k, to_v = w["mixed.weight"].split(WIDTH)
    r, k, v = by_heads(q_in @ to_r.T), by_heads(k_in @ to_k.T), by_heads(v_in @ to_v.T)
    if first is not None:
        share = v_in @ w["blend.gate.down.weight"].T @ w["blend.gate.up.weight"].T + w["blend.gate.up.bias"]
        v = v + sigmoid(by_heads(share)) * (first - v)
    d = torch.tanh(d_in @ w["decay.down.weight"].T) @ w["decay.up.weight"].T + w["decay.up.bias"]
    keep = by_heads(torch.exp(-math.exp(-0.5) * sigmoid(d)))
    a = a_in @ w["removal.down.weight"].T @ w["removal.up.weight"].T + w["removal.up.bias"]
    a = by_heads(sigmoid(a))
    gate = sigmoid(g_in @ w["output.gate.down.weight"].T) @ w["output.gate.up.weight"].T
    state, rows = zeros(HEADS, DIM, DIM), []
    for t in range(LENGTH):
        heads, added = [], []
        for h in range(HEADS):
            kappa = k[t, h] * w["removal.removed"][h]
            kappa = kappa / kappa.norm()
            key = k[t, h] * (1 + (a[t, h] - 1) * w["removal.replaced"][h])
            move = torch.diag(keep[t, h]) - torch.outer(kappa, a[t, h] * kappa)
            state[h] = state[h] @ move + torch.outer(v[t, h], key)
            heads.append(state[h] @ r[t, h])
            added.append((r[t, h] * w["late.weight"][h] * key).sum() * v[t, h])
        rows.append((grouped(torch.stack(heads), w) + torch.stack(added)).flatten() * gate[t])
    return torch.stack(rows) @ w["output.out.weight"].T


def gsa(w: Weights, x: Tensor) -> Tensor:
    """Kt = alpha Kt + (1 - alpha) k^T, Vt as well, o = Vt^T softmax(Kt q); the norm is over silu(o)."""
    q, k, v = (silu(each) for each in projected(w, x, DIM, DIM))
    alpha = by_heads(sigmoid(x @ w["decay.up.weight"].T + w["decay.up.bias"]) ** (1 / 8))
    keys, values, rows = zeros(HEADS, 64, DIM), zeros(HEADS, 64, DIM), []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            keep = torch.diag(alpha[t, h])
            keys[h] = keep @ keys[h] + torch.outer(1 - alpha[t, h], k[t, h])
            values[h] = keep @ values[h] + torch.outer(1 - alpha[t, h], v[t, h])
            weight = torch.exp(keys[h] @ q[t, h])
            heads.append(values[h].T @ (weight / weight.sum()))
        rows.append(rms(silu(torch.cat(heads)), w["output.norm.weight"]))
    return torch.stack(rows) @ w["output.out.weight"].T


def hla2(w: Weights, x: Tensor) -> Tensor:
    """o_t = q_t^T (S_t C_t - G_t): S = sum k k^T, C = sum q v^T, G = sum k k^T C_{t-1}."""
    q, k, v = projected(w, x, DIM, DIM)
    q = q / math.sqrt(DIM)
    moment, cross, later = zeros(HEADS, DIM, DIM), zeros(HEADS, DIM, DIM), zeros(HEADS, DIM, DIM)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            outer = torch.outer(k[t, h], k[t, h])
            later[h] = later[h] + outer @ cross[h]
            moment[h] = moment[h] + outer
            cross[h] = cross[h] + torch.outer(q[t, h], v[t, h])
            heads.append(rms(q[t, h] @ (moment[h] @ cross[h] - later[h]), w["output.norm.weight"]))
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["output.out.weight"].T


def mom(w: Weights, x: Tensor) -> Tensor:
    """Gated delta rule in memory 0 and in two of four others, whose state only their own tokens move."""
    inner = WIDTH * 5
    mixed = convolved(x @ w["mixed.weight"].T, w)
    q, k, v = mixed.split([WIDTH, inner, inner], 1)
    q, k, v = by_heads(q), k.view(LENGTH, 5, HEADS, DIM), v.view(LENGTH, 5, HEADS, DIM)
    alpha = torch.exp(
        -torch.exp(w["decay.rate"]) * softplus(x @ w["decay.step_size.weight"].T + w["decay.bias"])
    )
    alpha = alpha.view(LENGTH, 5, HEADS)
    beta = sigmoid(x @ w["beta.logit.weight"].T).view(LENGTH, 5, HEADS)
    share = torch.softmax(x @ w["memories.router.logits.weight"].T, 1)
    state, rows = zeros(5, HEADS, DIM, DIM), []
    for t in range(LENGTH):
        chosen = share[t].argsort(descending=True)[:2]
        weights = {0: 1.0} | {int(m) + 1: float(share[t, m] / share[t, chosen].sum()) for m in chosen}
        heads = []
        for h in range(HEADS):
            o = zeros(DIM)
            for m, weight in weights.items():
                key = unit(k[t, m, h])
                move = alpha[t, m, h] * (torch.eye(DIM) - beta[t, m, h] * torch.outer(key, key))
                state[m, h] = move @ state[m, h] + beta[t, m, h] * torch.outer(key, v[t, m, h])
                o = o + weight * (unit(q[t, h]) / math.sqrt(DIM)) @ state[m, h]
            heads.append(rms(o, w["output.norm.weight"]))
        rows.append(torch.cat(heads))
    return gated(rows, w, x, silu)


RULES = [rwkv7, gsa, hla2, mom]


@torch.no_grad()
@pytest.mark.parametrize("oracle", RULES, ids=lambda oracle: oracle.__name__)
def test_alias_is_its_papers_recurrence(oracle: Callable[[Weights, Tensor], Tensor]) -> None:
    mixer = replace(Linear(**Linear.aliases[oracle.__name__]), heads=HEADS)
    module, weights = built(mixer)
    x = sequence()
    y, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y[0], oracle(weights, x), rtol=1e-7, atol=1e-7)


def test_every_alias_has_an_oracle() -> None:
    assert set(Linear.aliases) == {oracle.__name__ for oracle in [*ORACLES, *MORE, *RULES]}


@torch.no_grad()
def test_layers_of_rwkv7_blend_in_the_values_of_the_first() -> None:
    x = sequence()
    lender, weights = built(replace(Linear(**Linear.aliases["rwkv7"]), heads=HEADS, values="own"))
    at = Pass(torch.arange(LENGTH), 0)
    lender(x[None], None, at)
    v_in = x + weights["shift.share"][2] * (back_of(x) - x)
    first = by_heads(v_in @ weights["mixed.weight"].split(WIDTH)[2].T)
    reader, weights = built(replace(Linear(**Linear.aliases["rwkv7"]), heads=HEADS, values="shared"))
    y, _ = reader(x[None], None, at)
    torch.testing.assert_close(y[0], rwkv7(weights, x, first), rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_partitions_of_a_state_are_written_and_read_by_their_share() -> None:
    """SSE over gated linear attention: o = q S_0 + p_m q' S_m for the partition m with the largest p."""
    mixer = Linear(
        decay="channel",
        forget="sigmoid",
        phi="softmax",
        conv="none",
        memories=Form("parts", (4, 1)),
        heads=HEADS,
        out_gate="none",
    )
    module, w = built(mixer)
    x = sequence()
    y, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    q, k, v = (x @ w["mixed.weight"].T).split(WIDTH, 1)
    apart = [x @ w[f"apart.{name}_down.weight"].T @ w[f"apart.{name}_up.weight"].T for name in "qk"]
    queries = [by_heads(each).softmax(-1) for each in (q, q + apart[0])]
    keys = [by_heads(each).softmax(-1) for each in (k, k + apart[1])]
    v = by_heads(v)
    logit = x @ w["decay.down.weight"].T @ w["decay.up.weight"].T + w["decay.up.bias"]
    alpha = (sigmoid(logit) ** (1 / 16)).view(LENGTH, 2, HEADS, DIM)
    share = torch.softmax(x @ w["memories.router.logits.weight"].T, 1)
    assert len(set(share.argmax(1).tolist())) > 1
    state, rows = zeros(5, HEADS, DIM, DIM), []
    for t in range(LENGTH):
        m = int(share[t].argmax())
        heads = []
        for h in range(HEADS):
            o = zeros(DIM)
            for of, place, weight in ((0, 0, 1.0), (1, m + 1, float(share[t, m]))):
                kept = torch.diag(alpha[t, of, h]) @ state[place, h]
                state[place, h] = kept + torch.outer(weight * keys[of][t, h], v[t, h])
                o = o + weight * queries[of][t, h] @ state[place, h]
            heads.append(rms(o, w["output.norm.weight"]))
        rows.append(torch.cat(heads))
    torch.testing.assert_close(y[0], torch.stack(rows) @ w["output.out.weight"].T, rtol=1e-7, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["add", "delta"])
def test_levels_weigh_the_past_by_buckets(rule: str) -> None:
    """o_t = sum over j <= t of lambda_t^level(t, j) times what token j still gives, each bucket doubling."""
    mixer = Linear(rule=rule, decay="scalar", conv="none", levels="log", heads=HEADS, out_gate="none")
    module, w = built(mixer)
    x = sequence()
    y, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    q, k, v = projected(w, x, DIM, DIM)
    rate = torch.exp(w["decay.rate"])
    alpha = torch.exp(-rate * softplus(x @ w["decay.step_size.weight"].T + w["decay.bias"]))
    weight = softplus(w["levels.scale"] * by_heads(x @ w["levels.logit.weight"].T))
    if rule == "delta":
        q, k = (each / torch.sqrt((each * each).sum(-1, keepdim=True) + 1e-6) for each in (q, k))
        beta = sigmoid(x @ w["beta.logit.weight"].T)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            o, move = zeros(DIM), torch.eye(DIM, dtype=torch.float64)
            level, size, start = 0, 1, t
            for j in range(t, -1, -1):
                # The bucket before this one has as many tokens as the lowest bit that is left.
                if j < start:
                    size = start & -start
                    start, level = start - size, size.bit_length()
                strength = beta[j, h] if rule == "delta" else 1.0
                read = q[t, h] / math.sqrt(DIM) @ move @ (strength * k[j, h])
                o = o + weight[t, h, level] * read * v[j, h]
                own = torch.eye(DIM, dtype=torch.float64)
                if rule == "delta":
                    own = own - beta[j, h] * torch.outer(k[j, h], k[j, h])
                move = move @ (alpha[j, h] * own)
            heads.append(rms(o, w["output.norm.weight"]))
        rows.append(torch.cat(heads))
    torch.testing.assert_close(y[0], torch.stack(rows) @ w["output.out.weight"].T, rtol=1e-7, atol=1e-7)


def test_what_does_not_go_together_is_named() -> None:
    for mixer, sentence in {
        Linear(rule="dplr", norm="max1"): "norm=max1 needs rule=add",
        Linear(rule="dplr", heads=2, key_heads=1): "removal key for each of 2 heads",
        Linear(rule="dplr", decay="both"): "decay=both needs rule=add",
        Linear(rule=Form("slots", (4,))): "say decay=channel",
        Linear(rule=Form("slots", (4,)), decay="channel", norm="max1"): "reads by a softmax",
        Linear(rule=Form("slots", (4,)), decay="channel", pos="lrpe"): "does not turn its slots",
        Linear(
            rule=Form("slots", (4,)), decay="channel", skip="late", out_norm="gated"
        ): "say out_norm=rms, group or none",
        Linear(rule="second", norm="max1", in_gate="exp"): "needs rule=add or delta",
        Linear(memories=Form("top", (4, 5))): "cannot have 5",
        Linear(memories=Form("top", (4, 2)), rule="dplr"): "needs rule=add or delta",
        Linear(memories=Form("top", (4, 2)), skip="head"): "skip=none",
        Linear(memories=Form("parts", (4, 1)), pos="lrpe"): "say pos=none, rope or xpos",
        Linear(levels="log"): "needs rule=add or delta and decay=head, layer or scalar",
        Linear(levels="log", decay="scalar", init="learned"): "init=zero",
        Linear(
            init=Form("prefix", (5,)), rule=Form("slots", (4,)), decay="channel"
        ): "rule=slots(4) has others",
        Linear(init=Form("prefix", (5,)), memories=Form("top", (4, 2))): "memories=top(4, 2) has others",
        Linear(init=Form("prefix", (5,)), key="latent"): "key=latent begins with keys",
        Linear(init=Form("prefix", (5,)), pos="xpos"): "say pos=rope",
        Linear(skip="late", out_norm="gated"): "say out_norm=rms, group or none",
        Linear(out_gate="inner"): "say its rank",
    }.items():
        assert sentence in str(mixer.why_illegal(WIDTH))
