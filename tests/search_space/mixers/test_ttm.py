"""Test-time memory as a float64 loop over tokens, its gradients by autograd on the loss of the papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.search_space.genes import Form, GeneValue
from mixforge.search_space.mixers.ttm import Ttm
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.test_time_memory import gates_of

LENGTH = 11


def says(weights: list[Tensor], x: Tensor, residual: bool) -> Tensor:
    h = x
    for weight in weights[:-1]:
        h = F.gelu(weight @ h)
    h = weights[-1] @ h
    if not residual:
        return h
    return x + (h - h.mean()) / (((h - h.mean()) ** 2).mean() + 1e-6).sqrt()


def slope_of(mixer: Ttm, error: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the loss on the error."""
    at = error.detach().requires_grad_()
    (found,) = torch.autograd.grad(loss(mixer, at, delta), at)
    return found


def loss(mixer: Ttm, error: Tensor, delta: Tensor) -> Tensor:
    if isinstance(mixer.loss, Form):
        p = mixer.loss.arguments[0]
        # The papers' smooth sign and size, held fixed, so that the slope is p sign(e) |e|^(p-1).
        slope = (p * torch.tanh(10 * error) * (error**2 + 1e-6) ** ((p - 1) / 2)).detach()
        return (slope * error).sum()
    size = (error**2).sum().sqrt()
    if mixer.loss == "huber" and size > delta:
        return delta * (size - delta / 2)
    return size**2 / 2


def linked(mixer: Ttm, kept: list[Tensor]) -> list[Tensor]:
    if mixer.retention == "kl":
        return [a.shape[1] * torch.exp(a) / torch.exp(a).sum(1, keepdim=True) - 1 for a in kept]
    if isinstance(mixer.retention, Form):
        q = mixer.retention.arguments[0]
        return [a / (a.abs() ** q).mean().clamp(min=1) ** ((q - 2) / q) for a in kept]
    return kept


def one_head(
    mixer: Ttm, first: list[Tensor], qkv: tuple[Tensor, Tensor, Tensor], gates: dict[str, Tensor]
) -> Tensor:
    """What one head reads at every token, by equations 9 and 10 of arXiv 2501.00663 and 24 to 27 of arXiv 2504.13173."""
    residual = mixer.memory != "matrix"
    kept, surprise, rows = first, [torch.zeros_like(a) for a in first], []
    for t in range(LENGTH):
        q, k, v = (each[t] for each in qkv)
        if t % mixer.chunk == 0:
            at_start = [w.detach().requires_grad_() for w in linked(mixer, kept)]
            read = [w.detach() for w in at_start]
        error = says(at_start, k, residual) - v
        slopes = torch.autograd.grad(loss(mixer, error, gates["delta"][t]), at_start)
        # No step goes past the value that it learns.
        gain = (slope_of(mixer, error, gates["delta"][t]) * error).sum().detach()
        reach = (gain / sum((g**2).sum() for g in slopes)).clamp(max=1)
        slopes = [reach * g for g in slopes]
        eta, theta, alpha = (gates[name][t] for name in ("eta", "theta", "alpha"))
        surprise = [eta * s - theta * g for s, g in zip(surprise, slopes, strict=True)]
        kept = [(1 - alpha) * a + s for a, s in zip(kept, surprise, strict=True)]
        read = [(1 - alpha) * w + s for w, s in zip(read, surprise, strict=True)]
        rows.append(says(read, q, residual))
    return torch.stack(rows)


def rows_of_ones(x: Tensor) -> Tensor:
    return x / (x**2).sum(-1, keepdim=True).sqrt()


POINTS: list[dict[str, GeneValue]] = [
    {},
    {"chunk": 1},
    {"chunk": 4, "memory": "matrix"},
    {"chunk": 3, "memory": Form("mlp", (3,))},
    {"chunk": 4, "memory": Form("mlp", (1,)), "loss": "huber"},
    {"chunk": 4, "retention": "kl"},
    {"chunk": 4, "retention": "kl", "memory": "matrix"},
    *({"chunk": 4, **Ttm.aliases[name]} for name in ("moneta", "yaad", "memora")),
    {"chunk": 1, **Ttm.aliases["moneta"]},
]


@pytest.mark.parametrize("genes", POINTS, ids=str)
def test_memory_is_its_equations(genes: dict[str, GeneValue]) -> None:
    width, heads, dim = 12, 2, 6
    mixer = Ttm(heads=heads, expand=2, conv=2, **genes)  # type: ignore[arg-type]
    assert mixer.why_illegal(width) is None
    torch.manual_seed(0)
    module = mixer.build(width, "torch").build().double()
    w = {name: weight.detach() for name, weight in module.named_parameters()}
    given = 3 * torch.randn(LENGTH, width, dtype=torch.float64)
    x = given / ((given**2).mean(-1, keepdim=True) + 1e-6).sqrt()
    p = x @ w["qkv.weight"].T
    p = torch.stack(
        [
            w["conv.weight"][:, 1] * p[t] + (w["conv.weight"][:, 0] * p[t - 1] if t else 0)
            for t in range(LENGTH)
        ]
    )
    q, k, v = (p / (1 + torch.exp(-p))).view(LENGTH, 3, heads, dim).unbind(1)
    q, k = rows_of_ones(q), rows_of_ones(k)
    logits = (x @ w["gates.weight"].T + w["gates.bias"]).view(LENGTH, -1, heads)
    zeros = torch.zeros(LENGTH, heads, dtype=torch.float64)
    gates = {
        "alpha": torch.sigmoid(logits[:, 0]),
        "theta": torch.sigmoid(logits[:, 1]),
        "eta": zeros,
        "delta": zeros,
    }
    if mixer.optimiser == "momentum":
        gates["eta"] = torch.sigmoid(logits[:, 2])
        gates["theta"] = (1 - gates["eta"]) * gates["theta"]
    if mixer.loss == "huber":
        gates["delta"] = torch.log1p(torch.exp(logits[:, -1]))
    read = []
    for head in range(heads):
        first = [w[f"memory.first.{i}"][head] for i in range(len(mixer.dims(width)) - 1)]
        mine = {name: gate[:, head] for name, gate in gates.items()}
        o = one_head(mixer, first, (q[:, head], k[:, head], v[:, head]), mine)
        read.append(o / ((o**2).mean(-1, keepdim=True) + 1e-6).sqrt() * w["norm.weight"])
    y = (torch.cat(read, -1) * torch.sigmoid(x @ w["gate.weight"].T)) @ w["out.weight"].T
    with torch.no_grad():
        y_BTD, _ = module(given[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y_BTD[0], y, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_the_memory_learns_what_it_reads() -> None:
    """The error on a key that comes again and again falls to what forgetting leaves of it."""
    torch.manual_seed(0)
    module = (
        Ttm(memory="matrix", heads=1, conv="none", chunk=1, optimiser="gd").build(8, "torch").build().double()
    )
    k, v = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 200, 8)
    k = k / k.norm(dim=-1, keepdim=True)
    gates = gates_of(module.memory, module.gates(torch.zeros(1, 200, 8, dtype=torch.float64)), module.heads)
    o, _ = module.memory(k, k, v, gates, module.memory.initial(1), 0)
    alpha, theta = 1 - gates.keep[0, 0, 0].exp(), gates.rate[0, 0, 0]
    # M k where (1 - alpha) M k - theta (M k - v) = M k.
    torch.testing.assert_close(o[0, 0, -1], theta / (alpha + theta) * v[0, 0, -1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", Ttm.aliases)
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e8])
def test_a_memory_is_not_chaotic(name: str, scale: float) -> None:
    """However long the text and large the input, the end depends on the start less than on what is near."""
    torch.manual_seed(0)
    module = Ttm(**Ttm.aliases[name]).build(32, "torch").build()  # type: ignore[arg-type]
    x_BTD = (scale * torch.randn(1, 500, 32)).requires_grad_()
    y_BTD, _ = module(x_BTD, None, Pass(torch.arange(500), 0))
    assert torch.isfinite(y_BTD).all()
    (y_BTD[:, -20:] * torch.randn(1, 20, 32)).sum().backward()
    assert x_BTD.grad is not None
    first, last = x_BTD.grad[:, :20].norm(), x_BTD.grad[:, -20:].norm()
    assert first < 0.1 * last
    for weight in module.parameters():
        assert weight.grad is not None
        assert weight.grad.norm() < 1e4


def test_a_loss_without_a_bound_is_refused() -> None:
    assert "memory=mlp(1)" in str(Ttm(memory="matrix", loss=Form("lp", (3,))).why_illegal(64))
    assert "order" in str(Ttm(head_dim=2).why_illegal(64))
    assert Ttm(retention=Form("lq", (2,))).canonical(64) == Ttm()
