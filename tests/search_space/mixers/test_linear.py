"""Each named point of the linear family against its paper's recurrence, written out as a float64 loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.linear import Linear
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.linear_attention import LinearAttention
from mixforge.search_space.vocabulary import parse_mixer

WIDTH, HEADS, LENGTH = 24, 3, 37
Weights = dict[str, Tensor]


def built(mixer: Linear) -> tuple[torch.nn.Module, Weights]:
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double()
    with torch.no_grad():
        for weight in module.parameters():
            # Norm weights start at 1 and biases at 0; the oracle should see which is which.
            weight.mul_(1 + 0.3 * torch.rand_like(weight))
    return module, dict(module.named_parameters())


def sequence(seed: int = 3) -> Tensor:
    return torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + 1e-6)


def unit(x: Tensor) -> Tensor:
    """The papers' x / |x| with the small term of the published models under the root."""
    return x / torch.sqrt((x * x).sum() + 1e-6)


def convolved(x_TF: Tensor, weights: Weights) -> Tensor:
    """silu of the last taps of each channel, the newest under the last weight."""
    taps_FW = weights["conv.weight"]
    rows = []
    for t in range(len(x_TF)):
        row = torch.zeros(x_TF.shape[1], dtype=torch.float64)
        for back in range(taps_FW.shape[1]):
            if t >= back:
                row = row + taps_FW[:, -1 - back] * x_TF[t - back]
        rows.append(silu(row))
    return torch.stack(rows)


def turned(x_K: Tensor, t: int) -> Tensor:
    """x as complex numbers (x_i, x_{i+K/2}), times e^{i t theta_i}."""
    half = len(x_K) // 2
    angle = t * torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    number = torch.complex(x_K[:half], x_K[half:]) * torch.exp(1j * angle)
    return torch.cat([number.real, number.imag])


def heads_of(mixed: Tensor, key_heads: int, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    keys = key_heads * key_dim
    q, k, v = mixed[:, :keys], mixed[:, keys : 2 * keys], mixed[:, 2 * keys :]
    return q.view(-1, key_heads, key_dim), k.view(-1, key_heads, key_dim), v.view(-1, HEADS, value_dim)


def retnet(w: Weights, x: Tensor) -> Tensor:
    dim = WIDTH // HEADS
    q, k, v = heads_of(x @ w["mixed.weight"].T, HEADS, dim, 2 * dim)
    state = torch.zeros(HEADS, dim, 2 * dim, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            gamma = 1 - 2.0 ** (-5 - h)
            state[h] = gamma * state[h] + torch.outer(turned(k[t, h], t), v[t, h])
            heads.append(rms(turned(q[t, h], t) / math.sqrt(dim) @ state[h], w["output.norm.weight"]))
        rows.append(silu(w["output.gate.weight"] @ x[t]) * torch.cat(heads))
    return torch.stack(rows) @ w["output.out.weight"].T


def gla(w: Weights, x: Tensor) -> Tensor:
    dim = WIDTH // HEADS
    q, k, v = heads_of(x @ w["mixed.weight"].T, HEADS, dim // 2, dim)
    logit = x @ w["decay.down.weight"].T @ w["decay.up.weight"].T + w["decay.up.bias"]
    alpha = (sigmoid(logit) ** (1 / 16)).view(LENGTH, HEADS, dim // 2)
    state = torch.zeros(HEADS, dim // 2, dim, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            state[h] = torch.diag(alpha[t, h]) @ state[h] + torch.outer(k[t, h], v[t, h])
            heads.append(rms(q[t, h] / math.sqrt(dim // 2) @ state[h], w["output.norm.weight"]))
        rows.append(silu(w["output.gate.weight"] @ x[t]) * torch.cat(heads))
    return torch.stack(rows) @ w["output.out.weight"].T


def delta_loop(w: Weights, x: Tensor, alpha_THK: Tensor, gate: Callable[[Tensor], Tensor] | None) -> Tensor:
    """S_t = (I - beta k k^T) Diag(alpha) S_{t-1} + beta k v^T, as the papers write it."""
    dim = WIDTH // HEADS
    q, k, v = heads_of(convolved(x @ w["mixed.weight"].T, w), HEADS, dim, dim)
    beta = sigmoid(x @ w["beta.logit.weight"].T)
    state = torch.zeros(HEADS, dim, dim, dtype=torch.float64)
    identity = torch.eye(dim, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            key = unit(k[t, h])
            erase = identity - beta[t, h] * torch.outer(key, key)
            state[h] = erase @ torch.diag(alpha_THK[t, h]) @ state[h] + beta[t, h] * torch.outer(key, v[t, h])
            heads.append(rms(unit(q[t, h]) / math.sqrt(dim) @ state[h], w["output.norm.weight"]))
        row = torch.cat(heads)
        rows.append(row if gate is None else gate(w["output.gate.weight"] @ x[t]) * row)
    return torch.stack(rows) @ w["output.out.weight"].T


def deltanet(w: Weights, x: Tensor) -> Tensor:
    return delta_loop(w, x, torch.ones(LENGTH, HEADS, WIDTH // HEADS, dtype=torch.float64), None)


def gdn(w: Weights, x: Tensor) -> Tensor:
    dt = softplus(x @ w["decay.step_size.weight"].T + w["decay.bias"])
    alpha = torch.exp(-torch.exp(w["decay.rate"]) * dt)
    return delta_loop(w, x, alpha[..., None].expand(-1, -1, WIDTH // HEADS), silu)


def kda(w: Weights, x: Tensor) -> Tensor:
    dt = softplus(x @ w["decay.down.weight"].T @ w["decay.up.weight"].T + w["decay.bias"])
    rate = torch.exp(w["decay.rate"])[:, None]
    alpha = torch.exp(torch.clamp(-rate * dt.view(LENGTH, HEADS, -1), min=-5))
    return delta_loop(w, x, alpha, sigmoid)


def mamba2(w: Weights, x: Tensor) -> Tensor:
    """h_t = exp(A dt) h_{t-1} + dt B_t x_t^T, y_t = C_t h_t + D x_t, with one B and one C for all heads."""
    value_dim = 2 * WIDTH // HEADS
    c, b, u = heads_of(convolved(x @ w["mixed.weight"].T, w), 1, 64, value_dim)
    dt = softplus(x @ w["decay.step_size.weight"].T + w["decay.bias"])
    a = -torch.exp(w["decay.rate"])
    state = torch.zeros(HEADS, 64, value_dim, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            state[h] = torch.exp(a[h] * dt[t, h]) * state[h] + dt[t, h] * torch.outer(b[t, 0], u[t, h])
            heads.append(c[t, 0] @ state[h] + w["skip.weight"][h] * u[t, h])
        gated = torch.cat(heads) * silu(w["output.gate.weight"] @ x[t])
        rows.append(rms(gated, w["output.norm.weight"]))
    return torch.stack(rows) @ w["output.out.weight"].T


def based(w: Weights, x: Tensor) -> Tensor:
    """sum_s f(q_t . k_s) v_s / sum_s f(q_t . k_s), with f(z) = 1 + z + z^2/2 and z = q.k/sqrt(K)."""
    q, k, v = heads_of(x @ w["mixed.weight"].T, HEADS, 16, WIDTH // HEADS)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(HEADS):
            z = k[: t + 1, h] @ q[t, h] / math.sqrt(16)
            weight = 1 + z + z * z / 2
            heads.append(weight @ v[: t + 1, h] / (weight.sum() + 1e-6))
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["output.out.weight"].T


ORACLES = [retnet, gla, deltanet, gdn, kda, mamba2, based]


@torch.no_grad()
@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.__name__)
def test_alias_is_its_papers_recurrence(oracle: Callable[[Weights, Tensor], Tensor]) -> None:
    mixer = replace(Linear(**Linear.aliases[oracle.__name__]), heads=HEADS)
    if mixer.key_heads is None:
        mixer = replace(mixer, key_heads=HEADS)
    module, weights = built(mixer)
    x_TD = sequence()
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y_BTD[0], oracle(weights, x_TD), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("phi", ["elu1", "relu"])
def test_feature_maps_with_the_denominator(phi: str) -> None:
    """Katharopoulos et al.: o_t = sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s)."""
    mixer = Linear(phi=phi, norm="denominator", conv="none", out_norm="none", out_gate="none", heads=HEADS)
    module, w = built(mixer)
    x = sequence()
    dim = WIDTH // HEADS
    q, k, v = heads_of(x @ w["mixed.weight"].T, HEADS, dim, dim)
    if phi == "elu1":
        q, k = (torch.where(each > 0, each + 1, torch.exp(each)) for each in (q, k))
    else:
        q, k = (torch.clamp(each, min=0) + 1e-3 for each in (q, k))
    rows = []
    for t in range(LENGTH):
        weight = torch.einsum("hk,shk->sh", q[t], k[: t + 1])
        # The module's queries are divided by sqrt(K) before its 1e-6 is added.
        total = weight.sum(0) + 1e-6 * math.sqrt(dim)
        rows.append((torch.einsum("sh,shv->hv", weight, v[: t + 1]) / total[:, None]).flatten())
    y_BTD, _ = module(x[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(rows) @ w["output.out.weight"].T, rtol=1e-9, atol=1e-9)


def test_the_denominator_is_divided_by_in_float32() -> None:
    """Features that nearly nothing has in common leave totals whose squares are nothing in float16."""
    torch.manual_seed(0)
    module = Linear(phi="relu", norm="denominator", conv="none", heads=16).build(64, "torch").build().half()
    x = torch.randn(2, 64, 64).half().requires_grad_()
    y, _ = module(x, None, Pass(torch.arange(64), 0))
    y.float().square().sum().backward()
    assert y.isfinite().all()
    for given in (x, *module.parameters()):
        assert given.grad is not None
        assert given.grad.isfinite().all()


@torch.no_grad()
def test_beta_reaches_two_and_then_reflects() -> None:
    """With beta = 2 a step is the Householder reflection I - 2 k k^T, whose eigenvalue along k is -1."""
    module, _ = built(Linear(rule="delta", beta=2, conv="none", out_gate="none", out_norm="none", heads=1))
    module.beta.logit.weight.fill_(0)
    assert torch.equal(
        module.beta(torch.zeros(1, 1, WIDTH, dtype=torch.float64)), torch.ones(1, 1, 1).double()
    )
    module.beta.logit.weight.fill_(100)
    assert module.beta(torch.ones(1, 1, WIDTH, dtype=torch.float64)).item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("genes", "words"),
    [
        ({"heads": 5}, "heads 5 does not divide width 24"),
        ({"key_heads": 2, "heads": 3}, "2 key heads do not divide 3 heads"),
        ({"rule": "delta", "qk_norm": "none"}, "length 1"),
        ({"norm": "denominator"}, "positive features"),
        ({"norm": "denominator", "rule": "delta", "phi": "elu1"}, "rule=add"),
        ({"in_gate": "dt"}, "decay=scalar"),
        ({"pos": "rope", "key_dim": 3, "value_dim": 3}, "even key_dim"),
    ],
)
def test_illegal_genes_are_named(genes: dict[str, int | str], words: str) -> None:
    reason = Linear(**genes).why_illegal(WIDTH)  # type: ignore[arg-type]
    assert reason is not None
    assert words in reason


def test_canonical_drops_what_says_nothing() -> None:
    assert Linear(heads=1, key_dim=24, value_dim=48, beta=2, forget="sigmoid", qk_norm="none").canonical(
        24
    ) == Linear(value_dim="double")
    assert Linear(rule="delta", qk_norm="l2", key_dim=12, key_heads=1).canonical(24) == Linear(
        rule="delta", key_dim="half"
    )
    taylor = Linear(phi=Form("taylor", (2,)), key_dim=16)
    assert taylor.sizes(64).features == 1 + 16 + 136


@pytest.mark.parametrize("text", ["mlstm(gate_cap=15)", "gdn(beta=2)", "mamba2(in_gate=sigmoid)"])
def test_gates_by_one_product_are_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = parse_mixer(text)
    assert isinstance(mixer, Linear)
    module, weights = built(mixer)
    x_BTD = torch.stack([sequence(seed) for seed in range(4)]).requires_grad_()
    found, products = [], []
    for is_joined in (True, False):
        if not is_joined:
            monkeypatch.setattr(LinearAttention, "read_at_once", lambda *_: None)
        with torch.autograd.profiler.profile() as profile:
            y_BTD, _ = module(x_BTD, None, Pass(torch.arange(LENGTH), 0))
        products.append(sum(event.name in ("aten::mm", "aten::addmm") for event in profile.function_events))
        found.append((y_BTD, *torch.autograd.grad(y_BTD.square().sum(), (x_BTD, *weights.values()))))
    assert products[0] < products[1]
    for joined, alone in zip(*found, strict=True):
        torch.testing.assert_close(joined, alone, rtol=1e-9, atol=1e-11)


# Dynamo makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_gates_by_one_product_are_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    mixer = parse_mixer("mlstm")
    assert isinstance(mixer, Linear)
    module, _ = built(mixer)
    x_BTD, at = torch.stack([sequence(seed) for seed in range(4)]), Pass(torch.arange(LENGTH), 0)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x_BTD, None, at)[0], module(x_BTD, None, at)[0])
