"""Pre-mixing attention over feed-forward experts against the paper's sums, token by token and expert by expert."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixforge.search_space.mixers.umoe import Umoe
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.layer import Pass

WIDTH, LENGTH = 12, 9


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary position of one head's channels."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def expert(up: Tensor, out: Tensor, x: Tensor, gated: bool) -> Tensor:
    hidden = up @ x
    if not gated:
        return out @ silu(hidden)
    gate, value = hidden.chunk(2)
    return out @ (silu(gate) * value)


def oracle(mixer: Umoe, w: dict[str, Tensor], x: Tensor) -> Tensor:
    dim, gated = mixer.head_dim, mixer.act == "swiglu"
    keys = [turned(w["key.weight"] @ row, t) for t, row in enumerate(x)]

    def mixed(query: Tensor, t: int) -> Tensor:
        scores = [torch.exp(turned(query, t) @ keys[s] / math.sqrt(dim)) for s in range(t + 1)]
        return sum(score * x[s] for s, score in enumerate(scores)) / sum(scores)  # type: ignore[return-value]

    outputs = []
    for t, row in enumerate(x):
        scores = torch.exp(w["router.logits.weight"] @ row)
        best = sorted(range(mixer.experts), key=lambda i: -float(scores[i]))[: mixer.top_k]
        y = torch.zeros(WIDTH, dtype=torch.float64)
        for i in best:
            query = w["query.weight"][:dim] @ row
            query = query + w["query_up.weight"][i] @ w["query_down.weight"][i] @ row
            said = expert(w["experts.up.weight"][i], w["experts.out.weight"][i], mixed(query, t), gated)
            y = y + scores[i] / sum(scores[j] for j in best) * said
        if mixer.shared:
            of_shared = mixed(w["query.weight"][dim:] @ row, t)
            y = y + expert(w["shared.up.weight"], w["shared.out.weight"], of_shared, gated)
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "mixer",
    [
        Umoe(experts=5, top_k=3, head_dim=4, query_rank=2, expand=0.5),
        Umoe(experts=4, top_k=2, head_dim=16, query_rank=3, act="silu", shared=2, expand=0.5),
    ],
    ids=str,
)
@torch.no_grad()
def test_experts_see_what_their_own_query_mixes(mixer: Umoe) -> None:
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double().eval()
    for weight in module.parameters():
        weight.mul_(2)
    x_TD = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(LENGTH), 0))
    torch.testing.assert_close(y_BTD[0], oracle(mixer, dict(module.named_parameters()), x_TD))


def test_a_feed_forward_layer_reads_the_experts_of_attention() -> None:
    model = parse("lm(2 * (umoe(head_dim=8) + moe(weights=shared)), width=24)").build()
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    assert len(names) == 2 * 2
    tokens_BT = torch.arange(2 * 11).reshape(2, 11)
    before = model(tokens_BT)
    layer = model.stack.units[1].mixer  # type: ignore[union-attr,index]
    assert layer.experts is None
    seen = {}
    handle = layer.register_forward_hook(lambda _, given, __: seen.update(given[2].shared))  # type: ignore[union-attr]
    model(tokens_BT)
    handle.remove()
    assert seen["experts"][0] is model.stack.units[0].mixer.experts.up.weight  # type: ignore[union-attr,index]
    with torch.no_grad():
        seen["experts"][0].zero_()
    assert not torch.allclose(model(tokens_BT), before)


def test_attention_reads_the_experts_of_a_feed_forward_layer() -> None:
    owned = parse("lm(umoe + umoe(weights=shared), width=64)").cost(9)
    assert owned.params < parse("lm(2 * umoe, width=64)").cost(9).params
    assert parse("lm(attn + moe + umoe(weights=shared), width=64)").why_illegal() is None


def test_illegal_genes_are_named() -> None:
    for genes, words in (
        ({"experts": 2, "top_k": 3}, "top_k 3 is more than the 2 experts"),
        ({"head_dim": 5}, "say 6"),
    ):
        reason = Umoe(**genes).why_illegal(WIDTH)  # type: ignore[arg-type]
        assert reason is not None
        assert words in reason
    reason = parse("lm(umoe(experts=4) + moe(weights=shared), width=64)").why_illegal()
    assert reason is not None
    assert "give both the same sizes" in reason
