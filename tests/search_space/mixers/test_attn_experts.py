"""Attention whose heads are experts against the equations of their paper."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import WIDTH, agree, attention, built, rope, split, tokens
from torch import Tensor

from mixforge.search_space.attention_parts import BALANCE
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.parts.layer import Pass


def test_each_token_takes_the_best_experts_over_one_head_of_keys() -> None:
    """Zhang et al., equations 3 to 8, expert by expert for each token."""
    experts, heads, dim = 5, 2, 6

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        share_TE = (x_TD @ w["routing.router.logits.weight"].T).softmax(-1)
        q_TEK = rope(split(x_TD @ w["queries.query.every.weight"].T, experts), dim)
        k_T1K = rope(split(x_TD @ w["memory.key.weight"].T, 1), dim)
        v_T1K = split(x_TD @ w["memory.value.weight"].T, 1)
        o_TEK = split(attention(q_TEK, k_T1K, v_T1K), experts)
        out_EDK = w["output.out.out.weight"].view(WIDTH, experts, dim).transpose(0, 1)
        rows = []
        for t in range(len(x_TD)):
            best = sorted(range(experts), key=lambda i: -float(share_TE[t, i]))[:heads]
            total = sum(share_TE[t, i] for i in best)
            rows.append(sum(share_TE[t, i] / total * (out_EDK[i] @ o_TEK[t, i]) for i in best))
        return torch.stack(rows)  # type: ignore[arg-type]

    agree(Attn(heads=heads, head_dim=dim, kv="mqa", experts=experts), expected)


def test_training_evens_the_load() -> None:
    """The router's gradient is that of the output and of E sum_i load_i P_i / M / k together."""
    module, w = built(Attn(heads=2, head_dim=6, kv="mqa", experts=5))
    x_TD = tokens()
    module.train()
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(len(x_TD)), 0))
    (0 * y_BTD).sum().backward()
    share_TE = (x_TD @ w["routing.router.logits.weight"].T).softmax(-1)
    load_E = torch.zeros(5, dtype=torch.float64)
    for row in share_TE.topk(2, -1).indices.flatten().tolist():
        load_E[row] += 1
    loss = BALANCE * 5 / (2 * len(x_TD)) * (load_E * share_TE.mean(0)).sum()
    (expected,) = torch.autograd.grad(loss, w["routing.router.logits.weight"])
    torch.testing.assert_close(w["routing.router.logits.weight"].grad, expected)


@pytest.mark.parametrize(
    ("genes", "words"),
    [
        ({"heads": 4, "kv": "mqa", "experts": 3}, "each token takes heads=4 of experts=3"),
        ({"heads": 2, "experts": 4}, "use kv=mqa"),
        ({"heads": 2, "kv": "mqa", "experts": 4, "forget": "head"}, "no forget=head"),
        ({"heads": 2, "kv": "mqa", "experts": 4, "pos": "alibi"}, "pos=alibi differs by head"),
    ],
)
def test_experts_take_nothing_that_is_of_one_head(genes: dict[str, object], words: str) -> None:
    reason = Attn(**genes).why_illegal(WIDTH)  # type: ignore[arg-type]
    assert reason is not None
    assert words in reason
