"""Attention to quantised keys against Transformer-VQ's equations over single tokens, and what its codes learn."""

from __future__ import annotations

import math

import torch
from attention_oracle import LENGTH, WIDTH, agree, at_once, attention, built, by_steps, rms, split, tokens
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.parts.layer import Pass

HEADS, CODES = 3, 5
MIXER = Attn(heads=HEADS, kv=Form("vq", (CODES,)), pos="none", qk_norm="rms")


def made(x_TD: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys that are not quantised yet, values."""
    q_THK, k_THK = (
        rms(split(x_TD @ w[f"{name}.weight"].T, HEADS), w[f"{name}_norm.weight"])
        for name in ("queries.query", "memory.key")
    )
    return q_THK, k_THK, split(x_TD @ w["memory.value.weight"].T, HEADS)


def nearest(k_THK: Tensor, codes_HCK: Tensor) -> Tensor:
    """For each key the code of its head at the least distance."""
    rows = []
    for k_HK in k_THK:
        found = []
        for h in range(HEADS):
            apart = [((k_HK[h] - code_K) ** 2).sum().item() for code_K in codes_HCK[h]]
            found.append(codes_HCK[h, apart.index(min(apart))])
        rows.append(torch.stack(found))
    return torch.stack(rows)


def test_keys_are_those_of_the_nearest_codes() -> None:
    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = made(x_TD, w)
        return attention(q_THK, nearest(k_THK, w["codebook"]), v_THK) @ w["output.out.weight"].T

    agree(MIXER, expected)


def test_codes_that_are_equally_near_change_nothing() -> None:
    module, weights = built(MIXER)
    x_TD = tokens()
    with torch.no_grad():
        weights["codebook"][:, 1::2] = weights["codebook"][:, :1]
        # Keys of no length are equally near to all of these.
        weights["memory.key.weight"][:8] = 0
        weights["codebook"][0] = weights["codebook"][0, :1]
    torch.testing.assert_close(by_steps(module, x_TD)[0], at_once(module, x_TD), rtol=1e-9, atol=1e-9)


def test_the_state_does_not_grow() -> None:
    module, _ = built(MIXER)
    _, state = by_steps(module, tokens())
    assert {name: tuple(kept.shape[1:]) for name, kept in state.items()} == {
        "count": (HEADS, CODES),
        "sum": (HEADS, CODES, WIDTH // HEADS),
    }
    assert (state["count"].sum(2) == LENGTH).all()
    assert MIXER.cost(WIDTH, 100).state_bytes == MIXER.cost(WIDTH, 100_000).state_bytes
    assert MIXER.cost(WIDTH, 20_000).flops == 2 * MIXER.cost(WIDTH, 10_000).flops


def test_gradients_pass_codes_as_if_they_were_keys() -> None:
    """In one block; with the distances to codes in training, of which a coefficient of 1e-4 reaches the keys."""
    for training in (False, True):
        module, w = built(MIXER)
        module.train(training)
        x_TD, length = tokens(CODES), CODES
        y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(length), 0))
        found = torch.autograd.grad(y_BTD.square().sum(), [w["memory.key.weight"], w["codebook"]])

        q_THK, k_THK, v_THK = made(x_TD, w)
        code_THK = nearest(k_THK, w["codebook"])
        straight_THK = code_THK + k_THK - k_THK.detach()
        z_HTS = torch.einsum("thk,shk->hts", q_THK, straight_THK) / math.sqrt(WIDTH // HEADS)
        later_TS = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
        o_TF = torch.einsum("hts,shv->thv", (z_HTS + later_TS).softmax(2), v_THK).flatten(1)
        loss = (o_TF @ w["output.out.weight"].T).square().sum()
        if training:
            loss = loss + ((k_THK.detach() - code_THK) ** 2).sum() / length
            loss = loss + 1e-4 * ((k_THK - code_THK.detach()) ** 2).sum() / length
        expected = torch.autograd.grad(loss, [w["memory.key.weight"], w["codebook"]])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
