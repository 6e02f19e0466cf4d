"""Positions of attention against the papers that define them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import WIDTH, agree, attention, projected, rope, rotated
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.parts.attention_scores import alibi_slopes
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.rotary import turn


def out(o_TF: Tensor, w: dict[str, Tensor]) -> Tensor:
    return o_TF @ w["output.out.weight"].T


def test_rotary_turns_a_share_of_the_channels_with_its_base() -> None:
    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = projected(x_TD, w, 2, 2)
        return out(attention(rope(q_THK, 6, 500.0), rope(k_THK, 6, 500.0), v_THK), w)

    agree(Attn(heads=2, theta=500.0, rotary=0.5), expected)


@pytest.mark.parametrize("turned", [6, 4])
def test_a_turn_has_both_derivatives(turned: int) -> None:
    """Of what is turned and of learned angles; channels beyond the angles pass as they are."""
    dice = torch.Generator().manual_seed(0)
    x_BTHK = torch.randn(2, 3, 2, 6, generator=dice, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(3, 2, turned // 2, generator=dice, dtype=torch.float64, requires_grad=True)
    pairs = torch.view_as_complex(
        torch.stack(x_BTHK[..., :turned].detach().chunk(2, -1), -1).contiguous()
    ) * torch.polar(torch.ones_like(angle), angle.detach())
    expected = torch.cat([pairs.real, pairs.imag, x_BTHK[..., turned:].detach()], -1)
    torch.testing.assert_close(turn(x_BTHK, angle), expected)
    assert torch.autograd.gradcheck(turn, (x_BTHK, angle))
    assert torch.autograd.gradgradcheck(turn, (x_BTHK, angle))
    # Gradients come in the layout of attention.
    lying = turn(x_BTHK, angle.detach()).transpose(1, 2).contiguous()
    (dx,) = torch.autograd.grad(lying.square().sum(), x_BTHK)
    torch.testing.assert_close(dx, 2 * x_BTHK.detach())


def test_xpos_lets_channels_decay_with_the_distance() -> None:
    """Sun et al., algorithm 1: each pair of channels adds Re(q conj(k) e^(i (t-s) f)) zeta^((t-s) / 512)."""

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = projected(x_TD, w, 2, 2)
        q_THK, k_THK = rope(q_THK, 12), rope(k_THK, 12)
        zeta = torch.tensor([(2 * i / 12 + 0.4) / 1.4 for i in range(6)], dtype=torch.float64).repeat(2)

        def score(_: Tensor, t: int, s: int, h: int) -> Tensor:
            return (q_THK[t, h] * k_THK[s, h] * zeta ** ((t - s) / 512)).sum() / math.sqrt(12)

        return out(attention(q_THK, k_THK, v_THK, score), w)

    agree(Attn(heads=2, pos="xpos"), expected)


def test_learned_frequencies_turn_each_group_of_heads() -> None:
    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = projected(x_TD, w, 4, 2)
        frequency = w["position.frequency"]

        def turn(x_THK: Tensor, group: int) -> Tensor:
            return torch.stack(
                [
                    torch.stack([rotated(head, t * frequency[h // group]) for h, head in enumerate(row)])
                    for t, row in enumerate(x_THK)
                ]
            )

        return out(attention(turn(q_THK, 2), turn(k_THK, 1), v_THK), w)

    agree(Attn(heads=4, kv=Form("gqa", (2,)), pos="lrpe"), expected)


def test_frequencies_made_of_tokens_add_up_to_their_angles() -> None:
    """Veisi et al.: phi_i(t) = sum over the tokens so far of f_h(x)^i, f = 1 / (1 + softplus(x W))."""

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = projected(x_TD, w, 2, 2)
        f_TH = 1 / (1 + F.softplus(x_TD @ w["position.frequency.weight"].T))

        def turn(x_THK: Tensor) -> Tensor:
            angle = torch.zeros(2, 6, dtype=torch.float64)
            rows = []
            for t, row in enumerate(x_THK):
                for h in range(2):
                    for i in range(1, 7):
                        angle[h, i - 1] += f_TH[t, h] ** i
                rows.append(torch.stack([rotated(head, angle[h]) for h, head in enumerate(row)]))
            return torch.stack(rows)

        return out(attention(turn(q_THK), turn(k_THK), v_THK), w)

    agree(Attn(heads=2, pos="carope"), expected)


@torch.no_grad()
def test_angles_that_add_up_are_exact_in_float32() -> None:
    """A step adds one frequency at a time: unit keys under a large scale show what each addition lost."""
    torch.manual_seed(0)
    layer = Attn(heads=4, pos="carope", qk_norm="l2").build(64, "torch").build().eval()
    x_BTD = torch.randn(2, 512, 64)
    whole, _ = layer(x_BTD, None, Pass(torch.arange(512), 0, {}))
    state = layer.initial_state(2, 512, x_BTD.device, x_BTD.dtype)
    steps = []
    for t in range(512):
        y_BD, state = layer.step(x_BTD[:, t], state, Pass(torch.arange(t, t + 1), t, {}))
        steps.append(y_BD)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=0, atol=1e-5)


def slopes_of(heads: int) -> list[float]:
    found: list[float] = alibi_slopes(heads, torch.device("cpu"), torch.float64).tolist()
    return found


def test_slopes_are_those_of_the_paper() -> None:
    """Press et al., section 3: for 8 heads 1/2 to 1/256, and for 12 the reference code adds every other of 16."""
    assert slopes_of(8) == [2.0**-h for h in range(1, 9)]
    assert slopes_of(12) == [2.0**-h for h in range(1, 9)] + [2.0 ** (-h / 2) for h in (1, 3, 5, 7)]


@pytest.mark.parametrize("heads", [4, 3])
def test_alibi_adds_slopes(heads: int) -> None:
    slopes = slopes_of(heads)

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = projected(x_TD, w, heads, heads)
        return out(attention(q_THK, k_THK, v_THK, lambda z, t, s, h: z - slopes[h] * (t - s)), w)

    agree(Attn(heads=heads, pos="alibi"), expected)


def test_swat_is_a_window_of_sigmoids_with_slopes_of_both_signs_on_turned_keys() -> None:
    """Fu et al., section 3.2: sigma(q k / sqrt(d) + slope (t - s)), half of the heads looking near and half far."""
    slopes = [-(2.0**-4), -(2.0**-8), 2.0**-4, 2.0**-8]

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = projected(x_TD, w, 4, 4)
        o_TF = attention(
            rope(q_THK, 6),
            rope(k_THK, 6),
            v_THK,
            score=lambda z, t, s, h: z + slopes[h] * (t - s),
            sees=lambda t, s: t - 5 < s <= t,
            weigh=lambda z_S, h: torch.sigmoid(z_S),
        )
        return out(o_TF, w)

    agree(Attn(heads=4, window=5, score="sigmoid", pos="alibi_rope"), expected)


def test_relative_positions_have_keys_and_values() -> None:
    """Shaw et al., equations 3 and 4, distances being clipped."""

    def expected(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
        q_THK, k_THK, v_THK = projected(x_TD, w, 3, 3)
        keys, values = w["scores.relative.key"], w["scores.relative.value"]
        rows = []
        for t in range(len(x_TD)):
            distance = [min(t - s, 4) for s in range(t + 1)]
            for h in range(3):
                z = (k_THK[: t + 1, h] + keys[distance]) @ q_THK[t, h] / math.sqrt(8)
                rows.append(z.softmax(0) @ (v_THK[: t + 1, h] + values[distance]))
        return out(torch.stack(rows).view(len(x_TD), WIDTH), w)

    agree(Attn(heads=3, pos=Form("relative", (4,))), expected)
