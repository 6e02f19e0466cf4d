"""Gated attention units as float64 loops of their papers' equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from attention_oracle import rope
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.gau import Gau
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.layer import Pass, TokenMixer

WIDTH, LENGTH, KEYS, VALUES = 8, 19, 4, 12


def built(mixer: Gau) -> tuple[TokenMixer, dict[str, Tensor]]:
    """In float64 with weights that are nowhere at their first values."""
    assert mixer.why_illegal(WIDTH) is None, mixer.why_illegal(WIDTH)
    torch.manual_seed(0)
    module: TokenMixer = mixer.build(WIDTH, "torch").build().double().eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return module, dict(module.named_parameters())


def inputs() -> Tensor:
    return torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def moving_averages(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
    """MEGA, equation 4: u = beta x, h = alpha u + (1 - alpha delta) h before, y = eta . h, and silu(y + omega x)."""
    alpha, delta = sigmoid(w["feed.scan.average"]), sigmoid(w["feed.scan.damping"])
    beta, eta = w["feed.scan.expansion"], w["feed.scan.weight"]
    h_DN = torch.zeros_like(alpha)
    rows = []
    for x_D in x_TD:
        h_DN = alpha * beta * x_D[:, None] + (1 - alpha * delta) * h_DN
        y_D = (eta * h_DN).sum(1) / math.sqrt(alpha.shape[1])
        rows.append(silu(y_D + w["feed.scan.skip"] * x_D))
    return torch.stack(rows)


def state_space(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
    """S4D: h = exp(dt A) h before + (exp(dt A) - 1) / A x, y = 2 Re C . h + D x, and silu(y)."""
    a_DN = torch.complex(-w["feed.scan.rate"].exp(), w["feed.scan.frequency"])
    c_DN = torch.view_as_complex(w["feed.scan.weight"].contiguous())
    step = torch.exp(a_DN * w["feed.scan.step_size"].exp()[:, None])
    h_DN = torch.zeros_like(step)
    rows = []
    for x_D in x_TD:
        h_DN = step * h_DN + (step - 1) / a_DN * x_D[:, None]
        rows.append(silu(2 * (c_DN * h_DN).sum(1).real + w["feed.scan.skip"] * x_D))
    return torch.stack(rows)


def convolutions(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Two of three taps, at distances of 1 and then of 2."""
    for number, apart in ((0, 1), (1, 2)):
        taps = w[f"feed.convs.{number}.weight"][:, 0]
        rows = []
        for t in range(len(x_TD)):
            seen = [(j, t - (2 - j) * apart) for j in range(3)]
            said = sum(taps[:, j] * x_TD[s] for j, s in seen if s >= 0)
            assert isinstance(said, Tensor)
            rows.append(x_TD[t] + silu(said))
        x_TD = torch.stack(rows)
    return x_TD


def plain(x_TD: Tensor, w: dict[str, Tensor]) -> Tensor:
    return x_TD


def asked(z_TK: Tensor, w: dict[str, Tensor], name: str, turns: bool) -> Tensor:
    """a z + b, turned by its position."""
    q_TK = w[f"attention.{name}.scale"] * z_TK + w[f"attention.{name}.offset"]
    return rope(q_TK[:, None], KEYS)[:, 0] if turns else q_TK


def softmax(z_S: Tensor) -> Tensor:
    return z_S.exp() / z_S.exp().sum()


def squared(z_S: Tensor) -> Tensor:
    return z_S.clamp(min=0) ** 2 / len(z_S)


def expected(
    x_TD: Tensor,
    w: dict[str, Tensor],
    feed: Callable[[Tensor, dict[str, Tensor]], Tensor],
    block: int,
    weigh: Callable[[Tensor], Tensor] = softmax,
    turns: bool = True,
    triple: bool = False,
) -> Tensor:
    """y of the unit; where there are weights for it, of MEGA's update, and with linear attention to earlier blocks."""
    fed_TD = feed(x_TD, w)
    made_TF = fed_TD @ w["made.weight"].T + w["made.bias"]
    v_TF = silu(x_TD @ w["value.weight"].T + w["value.bias"])
    z_TK, g_TF = silu(made_TF[:, :KEYS]), silu(made_TF[:, KEYS : KEYS + VALUES])
    q_TK, k_TK = asked(z_TK, w, "query", turns), asked(z_TK, w, "key", turns)
    if "attention.codebook" in w:
        codes = w["attention.codebook"][0]
        k_TK = torch.stack([codes[((codes - k_K) ** 2).sum(1).argmin()] for k_K in k_TK])
    biases = w.get("attention.bias.weight", x_TD[:0, 0])
    rows = []
    for t in range(LENGTH):
        first = t - t % block
        read_TF = v_TF if not triple else torch.cat([v_TF, g_TF], 1)
        z_S = torch.stack([q_TK[t] @ k_TK[s] / math.sqrt(KEYS) for s in range(first, t + 1)])
        for s in range(first, t + 1):
            if t - s < len(biases):
                z_S[s - first] += biases[t - s]
        o_F = weigh(z_S) @ read_TF[first : t + 1]
        if "attention.earlier.query.scale" in w:
            far_TK, near_TK = (asked(z_TK, w, f"earlier.{name}", turns) for name in ("query", "key"))
            for s in range(first):
                o_F = o_F + (far_TK[t] @ near_TK[s]) * read_TF[s] / block
        said_F = g_TF[t] * o_F[:VALUES]
        if triple:
            said_F = o_F[VALUES:] * v_TF[t] * sigmoid(o_F[:VALUES] * g_TF[t])
        said_D = w["out.weight"] @ said_F + w["out.bias"]
        if made_TF.shape[1] > KEYS + VALUES:
            u_D, h_D = made_TF[t, KEYS + VALUES :].chunk(2)
            said_D = sigmoid(u_D) * (silu(h_D + said_D) - x_TD[t])
        rows.append(said_D)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("genes", "feed", "block", "weigh", "turns"),
    [
        pytest.param({}, plain, LENGTH, softmax, True, id="unit"),
        pytest.param(
            {"sparse": Form("mixed", (5,)), "score": "relu2"},
            plain,
            5,
            squared,
            True,
            id="mixed chunks of FLASH",
        ),
        pytest.param(
            {"sparse": Form("mixed", (5,)), "score": "relu2", "gate": "triple"},
            plain,
            5,
            squared,
            True,
            id="triple gates of MossFormer",
        ),
        pytest.param(
            {
                "feed": Form("ema", (3,)),
                "gate": "update",
                "sparse": Form("chunk", (6,)),
                "pos": Form("distance", (6,)),
            },
            moving_averages,
            6,
            softmax,
            False,
            id="MEGA",
        ),
        pytest.param(
            {"sparse": Form("mixed", (5,)), "score": "relu2", "pos": Form("distance", (3,))},
            plain,
            5,
            squared,
            False,
            id="biases of near tokens alone",
        ),
        pytest.param(
            {"feed": Form("tcn", (3, 2, 2)), "gate": "update", "sparse": Form("chunk", (6,))},
            convolutions,
            6,
            softmax,
            True,
            id="TCNCA",
        ),
        pytest.param(
            {"feed": Form("s4d", (6,)), "gate": "update", "sparse": Form("vq", (5,)), "pos": "none"},
            state_space,
            LENGTH,
            softmax,
            False,
            id="LongVQ",
        ),
        pytest.param(
            {"sparse": Form("vq", (3,)), "pos": Form("distance", (4,))},
            plain,
            LENGTH,
            softmax,
            False,
            id="codes and a window with biases",
        ),
    ],
)
@torch.no_grad()
def test_unit_is_its_papers_equations(
    genes: dict[str, str | Form],
    feed: Callable[[Tensor, dict[str, Tensor]], Tensor],
    block: int,
    weigh: Callable[[Tensor], Tensor],
    turns: bool,
) -> None:
    mixer = Gau(key_dim=KEYS, expand=VALUES / WIDTH, **genes)  # type: ignore[arg-type]
    module, w = built(mixer)
    x_TD = inputs()
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(LENGTH), 0))
    wanted_TD = expected(x_TD, w, feed, block, weigh, turns, genes.get("gate") == "triple")
    torch.testing.assert_close(y_BTD[0], wanted_TD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("genes", "seen"),
    [
        ({}, 19),
        ({"pos": Form("distance", (3,))}, 19),
        ({"score": "relu2"}, 19),
        ({"sparse": Form("chunk", (10,))}, 9),
        ({"sparse": Form("chunk", (10,)), "score": "relu2"}, 9),
    ],
)
@torch.no_grad()
def test_a_piece_of_a_prefill_takes_no_products_of_the_queries_before(
    genes: dict[str, str | Form], seen: int
) -> None:
    """Two tokens after 17, of which each is weighed against the keys that are there."""
    module, w = built(Gau(key_dim=KEYS, expand=VALUES / WIDTH, **genes))  # type: ignore[arg-type]
    x_BTD, at = inputs()[None], Pass(torch.arange(LENGTH), 0)
    whole_BTD, _ = module(x_BTD, None, at)
    state = module.initial_state(1, LENGTH, x_BTD.device, x_BTD.dtype)
    module(x_BTD[:, :17], state, Pass(at.positions_T[:17], 0))
    with FlopCounterMode(display=False) as counter:
        y_BTD, _ = module(x_BTD[:, 17:], state, Pass(at.positions_T[17:], 17))
    matrices = sum(weight.numel() for weight in w.values() if weight.ndim == 2)
    assert counter.get_total_flops() == 2 * 2 * (matrices + seen * (KEYS + VALUES))
    torch.testing.assert_close(y_BTD, whole_BTD[:, 17:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_an_update_gate_stands_for_the_residual_connection() -> None:
    """MEGA, equation 16: norm(u h + (1 - u) x), of the unit's own u and h."""
    model = parse(f"lm(residual(mega(key_dim={KEYS}), place=post), width={WIDTH}, vocab=11)").build(
        dtype=torch.float64
    )
    unit = model.stack.units[0]
    x_BTD = inputs()[None]
    at = Pass(torch.arange(LENGTH), 0)
    mixer = unit.mixer  # type: ignore[union-attr]
    assert isinstance(mixer, TokenMixer)
    fed_BTD, _ = mixer.feed(x_BTD, None, at)  # type: ignore[operator]
    u_BTD = sigmoid(mixer.made(fed_BTD)[..., -2 * WIDTH : -WIDTH])  # type: ignore[operator]
    said_BTD = mixer(x_BTD, None, at)[0] / u_BTD + x_BTD
    mixed_BTD = u_BTD * said_BTD + (1 - u_BTD) * x_BTD
    size = mixed_BTD.square().mean(-1, keepdim=True)
    torch.testing.assert_close(unit(x_BTD, None, at)[0], mixed_BTD / torch.sqrt(size + 1e-6))  # type: ignore[operator]


def test_distances_to_codes_are_added_to_the_loss_of_training() -> None:
    module, w = built(Gau(key_dim=KEYS, sparse=Form("vq", (5,)), pos="none"))
    x_BTD, at = inputs()[None], Pass(torch.arange(LENGTH), 0)
    gradients = []
    for training in (False, True):
        y_BTD, _ = module.train(training)(x_BTD, None, at)
        gradients.append(torch.autograd.grad(y_BTD.sum(), w["attention.codebook"])[0])
    z_TK = silu((x_BTD[0] @ w["made.weight"].T + w["made.bias"])[:, :KEYS])
    k_TK = asked(z_TK, w, "key", False).detach()
    codes = w["attention.codebook"]
    nearest = [((codes[0] - k_K) ** 2).sum(1).argmin() for k_K in k_TK]
    loss = sum(((k_K - codes[0, c]) ** 2).sum() for k_K, c in zip(k_TK, nearest, strict=True)) / LENGTH
    assert isinstance(loss, Tensor)
    added = torch.autograd.grad(loss, codes)[0]
    torch.testing.assert_close(gradients[1] - gradients[0], added, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", ["chunk", "mixed"])
def test_distances_that_no_block_has_are_dropped(pattern: str) -> None:
    far, near = (Gau(sparse=Form(pattern, (6,)), pos=Form("distance", (n,))) for n in (9, 6))
    assert far.canonical(WIDTH) == near.canonical(WIDTH) == near
    assert far.cost(WIDTH, LENGTH) == near.cost(WIDTH, LENGTH)
    assert far.build(WIDTH, "torch") == near.build(WIDTH, "torch")


def test_how_far_one_convolution_is_from_others_is_dropped() -> None:
    said, plain = (Gau(feed=Form("tcn", (5, r, 1))).canonical(WIDTH) for r in (64, 1))
    assert said == plain
    assert said.fault is None
    assert said.why_illegal(WIDTH) is None
    assert Gau(feed=Form("tcn", (5, 64, 2))).canonical(WIDTH) != plain


def test_the_state_of_codes_and_chunks_does_not_grow() -> None:
    for sparse in ("vq(8), pos=none", "chunk(8)", "mixed(8)"):
        given = parse(f"lm(gau(feed=ema(4), sparse={sparse}), width=32)")
        assert given.cost(64).state_bytes == given.cost(6400).state_bytes


@pytest.mark.parametrize(
    ("genes", "says"),
    [
        ({"feed": Form("s4d", (3,))}, "conjugate pairs"),
        ({"sparse": Form("vq", (4,))}, "pos=none or distance(n)"),
        ({"sparse": Form("vq", (4,)), "pos": "none", "score": "relu2"}, "score=relu2"),
        ({"key_dim": 3}, "key_dim 3 is odd"),
        ({"feed": Form("tcn", (256, 64, 16))}, "reaches back more than 1048576 tokens"),
    ],
)
def test_what_does_not_go_together_is_told(genes: dict[str, str | int | Form], says: str) -> None:
    assert says in str(Gau(**genes).why_illegal(WIDTH))  # type: ignore[arg-type]


def test_a_share_that_leaves_too_few_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.0625 times the width; give it an expand of 0\.25 or more"):
        Gau(expand=0.125).narrow(64, Fraction(1, 2))
    assert Gau(expand=0.25).narrow(64, Fraction(1, 2)) == Gau(expand=0.125).canonical(64)
