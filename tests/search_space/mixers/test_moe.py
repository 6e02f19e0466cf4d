"""Mixture of experts against the equations of its papers, token by token in float64, and what balances its load."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.moe import Moe
from mixforge.search_space.model import build
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.layer import Pass

WIDTH, TOKENS = 12, 17
PLAIN = {
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "relu": lambda z: z * (z > 0),
    "relu2": lambda z: (z * (z > 0)) ** 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
}


def activated(h: Tensor, mixer: Moe) -> Tensor:
    if isinstance(mixer.act, Form):
        limit = mixer.act.arguments[0]
        gate, up = h.chunk(2)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    if mixer.act in ("swiglu", "geglu"):
        gate, up = h.chunk(2)
        return PLAIN["silu" if mixer.act == "swiglu" else "gelu"](gate) * up
    return PLAIN[mixer.act](h)


def chosen(score: Tensor, selects: Tensor, mixer: Moe) -> list[int]:
    """The experts of one token, by sorting."""
    allowed = set(range(mixer.experts))
    if mixer.groups != "none":
        kept, groups = map(int, mixer.groups.arguments)
        size = mixer.experts // groups
        if mixer.score == "sigmoid":
            quality = [sum(sorted(selects[g * size : (g + 1) * size].tolist())[-2:]) for g in range(groups)]
        else:
            quality = [max(selects[g * size : (g + 1) * size].tolist()) for g in range(groups)]
        best = sorted(range(groups), key=lambda g: -quality[g])[:kept]
        allowed = {e for g in best for e in range(g * size, (g + 1) * size)}
    return sorted(allowed, key=lambda e: -selects[e].item())[: mixer.top_k]


def expected(x: Tensor, w: Mapping[str, Tensor], mixer: Moe, shift: Tensor) -> Tensor:
    """y of one token [D]."""
    logits = w["router.logits.weight"] @ x + w.get("router.logits.bias", torch.zeros(()))
    score = (
        torch.exp(logits) / torch.exp(logits).sum()
        if mixer.score == "softmax"
        else 1 / (1 + torch.exp(-logits))
    )
    who = chosen(score, score + shift, mixer)
    total = sum(score[e] for e in who) if mixer.renorm == "sum" else 1
    y = torch.zeros_like(x)
    for e in who:
        h = w["experts.up.weight"][e] @ x
        h = h + w["experts.up.bias"][e] if "experts.up.bias" in w else h
        out = w["experts.out.weight"][e] @ activated(h, mixer)
        out = out + w["experts.out.bias"][e] if "experts.out.bias" in w else out
        y = y + mixer.scale * score[e] / total * out
    if mixer.shared:
        h = w["shared.up.weight"] @ x + w.get("shared.up.bias", torch.zeros(()))
        out = w["shared.out.weight"] @ activated(h, mixer) + w.get("shared.out.bias", torch.zeros(()))
        if mixer.shared_gate == "sigmoid":
            out = out / (1 + torch.exp(-(w["shared_gate.weight"][0] @ x)))
        y = y + out
    return y


MIXTRAL = Moe(experts=8, top_k=2)
DEEPSEEK_V2 = Moe(
    experts=8, top_k=3, shared=2, expand=0.5, renorm="none", scale=16, groups=Form("best", (2, 4))
)
DEEPSEEK_V3 = Moe(
    experts=8,
    top_k=3,
    shared=1,
    expand=0.5,
    score="sigmoid",
    balance="bias",
    scale=2.5,
    groups=Form("best", (2, 4)),
)
QWEN2_MOE = Moe(
    experts=6, top_k=4, shared=4, expand=0.5, renorm="none", shared_gate="sigmoid", balance="loss"
)
GPT_OSS = Moe(experts=4, top_k=2, act=Form("clamped", (0.25,)), bias="all")


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer",
    [
        MIXTRAL,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        QWEN2_MOE,
        GPT_OSS,
        *(Moe(act=act, shared=1) for act in (*PLAIN, "geglu")),
    ],
)
def test_experts_are_their_equations(mixer: Moe) -> None:
    assert mixer.why_illegal(WIDTH) is None
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double().eval()
    for weight in module.parameters():
        weight.normal_()
    shift = torch.zeros(mixer.experts, dtype=torch.float64)
    if mixer.balance == "bias":
        # Large enough to choose others than the scores alone would.
        module.router.bias.copy_(shift.normal_())
    w = dict(module.named_parameters())
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    y_TD = torch.stack([expected(x, w, mixer, shift) for x in x_TD])
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(TOKENS), 0))
    torch.testing.assert_close(y_BTD[0], y_TD)
    y_BD, _ = module.step(x_TD, {}, Pass(torch.zeros(1, dtype=torch.int64), 0))
    torch.testing.assert_close(y_BD, y_TD)


@pytest.mark.parametrize("mixer", [MIXTRAL, GPT_OSS])
def test_gradients_of_experts_are_those_of_their_equations(mixer: Moe) -> None:
    module, x_BTD, _ = trained_pass(mixer)
    x_TD = x_BTD[0].requires_grad_()
    w = dict(module.named_parameters())
    shift = torch.zeros(mixer.experts, dtype=torch.float64)
    y_TD = torch.stack([expected(x, w, mixer, shift) for x in x_TD])
    given = torch.randn_like(y_TD)
    wanted = torch.autograd.grad(y_TD, (x_TD, *w.values()), given)
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(TOKENS), 0))
    for found, want in zip(torch.autograd.grad(y_BTD[0], (x_TD, *w.values()), given), wanted, strict=True):
        torch.testing.assert_close(found, want)


def trained_pass(mixer: Moe) -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double().train()
    x_BTD = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    y_BTD, _ = module(x_BTD, None, Pass(torch.arange(TOKENS), 0))
    return module, x_BTD, y_BTD


def loads(module: torch.nn.Module, x_BTD: Tensor) -> Tensor:
    """Tokens that each expert gets from a router without a balancing bias."""
    index = F.linear(x_BTD, module.router.logits.weight).topk(module.router.top_k, -1).indices
    return torch.bincount(index.flatten(), minlength=module.router.logits.weight.shape[0]).double()


def test_the_balancing_bias_moves_by_its_rate_toward_an_even_load() -> None:
    module, x_BTD, _ = trained_pass(Moe(experts=5, top_k=2, balance=Form("bias", (0.25,))))
    load = loads(module, x_BTD)
    torch.testing.assert_close(module.router.bias, 0.25 * torch.sign(load.mean() - load))
    before = module.router.bias.clone()
    module.eval()(x_BTD, None, Pass(torch.arange(TOKENS), 0))
    with torch.no_grad():
        module.train()(x_BTD, None, Pass(torch.arange(TOKENS), 0))
    assert torch.equal(module.router.bias, before)


def test_the_balancing_bias_evens_the_load() -> None:
    mixer = Moe(experts=8, top_k=2, score="sigmoid", balance=Form("bias", (0.004,)))
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().train()
    # Inputs that share a direction send most tokens to the same experts.
    x_BTD = torch.randn(8, 64, WIDTH) + 2 * torch.randn(WIDTH)

    def spread() -> float:
        index = module.router(x_BTD.flatten(0, 1))[1]
        load = torch.bincount(index.flatten(), minlength=8).float()
        return float(load.max() / load.mean())

    before = spread()
    for _ in range(200):
        spread()
    assert before > 2
    assert spread() < 1.3


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balancing_loss_reaches_the_router_through_the_output(score: str) -> None:
    experts, top_k, rate = 5, 2, 0.5
    given = Moe(experts=experts, top_k=top_k, score=score, balance=Form("loss", (rate,)))
    module, x_BTD, y_BTD = trained_pass(given)
    plain, _, without = trained_pass(Moe(experts=experts, top_k=top_k, score=score))
    assert torch.equal(y_BTD, without)
    (y_BTD**2).sum().backward()
    (without**2).sum().backward()
    # The loss of arXiv 2101.03961, equations 4 to 6, written out and differentiated by itself.
    weight = plain.router.logits.weight.detach().clone().requires_grad_()
    logits = x_BTD.flatten(0, 1) @ weight.T
    score_ME = logits.softmax(-1) if score == "softmax" else torch.sigmoid(logits)
    share = (score_ME / score_ME.sum(-1, keepdim=True)).mean(0)
    load = loads(plain, x_BTD) / (2 * TOKENS * top_k)
    (rate * experts * sum(f * p for f, p in zip(load, share, strict=True))).backward()
    torch.testing.assert_close(
        module.router.logits.weight.grad, plain.router.logits.weight.grad + weight.grad
    )
    assert weight.grad.abs().max() > 0


def test_layers_share_the_experts_of_the_nearest_owner() -> None:
    shared = parse("lm(2 * (attn + moe) + attn + moe(weights=shared), width=24)")
    own = parse("lm(2 * (attn + moe) + attn + moe, width=24)")
    expert = 3 * 24 * 64
    assert own.cost(8).params - shared.cost(8).params == 8 * expert
    assert own.cost(8).decode_bytes == shared.cost(8).decode_bytes
    assert own.cost(8).active_params == own.cost(8).params - 3 * 6 * expert
    model = build(shared)
    mixers = [unit.mixer for unit in model.stack.units]
    assert mixers[5].experts is None
    tokens = torch.randint(256, (1, 9))
    before = model(tokens)
    with torch.no_grad():
        mixers[1].experts.up.weight.copy_(mixers[3].experts.up.weight)
        assert not torch.allclose(model(tokens), before)
        # The last layer alone: only the experts of the layer before it change what it says.
        x_BTD, at = torch.randn(1, 9, 24), Pass(torch.arange(9), 0)
        at.shared["experts"] = mixers[3].experts.lent()
        y_BTD, _ = mixers[5](x_BTD, None, at)
        mixers[3].experts.up.weight.mul_(2)
        assert not torch.allclose(mixers[5](x_BTD, None, at)[0], y_BTD)


def test_reasons_name_the_way_out() -> None:
    assert "renorm=none" in str(Moe(top_k=1).why_illegal(24))
    assert "more than the 2 experts" in str(Moe(experts=2, top_k=3).why_illegal(24))
    assert "2 of 3 groups of 8" in str(Moe(groups=Form("best", (2, 3))).why_illegal(24))
    assert "top_k 3 from" in str(Moe(top_k=3, groups=Form("best", (1, 4))).why_illegal(24))
    reason = parse("lm(attn + moe(experts=4) + moe(weights=shared), width=24)").why_illegal()
    assert reason is not None
    assert "shared experts of 8 x 128 x 24" in reason
    reason = parse("lm(attn + moe(weights=shared), width=24)").why_illegal()
    assert reason is not None
    assert "weights=own" in reason
