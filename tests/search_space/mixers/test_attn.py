"""Softmax attention against equation 1 of its paper as a float64 loop, for every kind of cache and window."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.presets import preset

WIDTH, LENGTH = 24, 41
PREFIX = Form("prefix", (5,))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + 1e-6)


def turned(x_K: Tensor, t: int) -> Tensor:
    half = len(x_K) // 2
    angle = t * torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    number = torch.complex(x_K[:half], x_K[half:]) * torch.exp(1j * angle)
    return torch.cat([number.real, number.imag])


def oracle(mixer: Attn, w: dict[str, Tensor], x: Tensor) -> Tensor:
    heads, kv_heads, dim = mixer.sizes(WIDTH)
    q = (x @ w["queries.query.weight"].T).view(-1, heads, dim)
    k = (x @ w["memory.key.weight"].T).view(-1, kv_heads, dim)
    v = (x @ w["memory.value.weight"].T).view(-1, kv_heads, dim)

    def placed(row: Tensor, t: int, norm: str) -> Tensor:
        row = rms(row, w[norm]) if mixer.qk_norm == "rms" else row
        return turned(row, t) if mixer.pos == "rope" else row

    rows = []
    for t in range(len(x)):
        first = 0 if isinstance(mixer.window, str) else max(0, t - mixer.window + 1)
        outputs = []
        for h in range(heads):
            group = h // (heads // kv_heads)
            query = placed(q[t, h], t, "queries.query_norm.weight")
            scores = [query @ placed(k[s, group], s, "memory.key_norm.weight") for s in range(first, t + 1)]
            weight = torch.exp(torch.stack(scores) / math.sqrt(dim))
            outputs.append((weight / weight.sum()) @ v[first : t + 1, group])
        row = torch.cat(outputs)
        if mixer.out_gate == "sigmoid":
            row = row / (1 + torch.exp(-w["output.gate.weight"] @ x[t]))
        rows.append(row)
    return torch.stack(rows) @ w["output.out.weight"].T


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer",
    [
        Attn(heads=3),
        Attn(heads=4, kv="mqa", pos="none"),
        Attn(heads=4, kv=Form("gqa", (2,)), qk_norm="rms"),
        Attn(heads=2, head_dim=6, out_gate="sigmoid"),
        Attn(heads=2, window=5),
        Attn(heads=2, window=10),
        Attn(heads=2, window=11, kv="mqa", qk_norm="rms"),
        Attn(heads=2, window=100),
        Attn(heads=3, kv="own"),
    ],
    ids=str,
)
def test_attention_is_its_equation(mixer: Attn) -> None:
    torch.manual_seed(0)
    module = mixer.build(WIDTH, "torch").build().double()
    for weight in module.parameters():
        weight.mul_(2 + 0.3 * torch.rand_like(weight))
    x_TD = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(LENGTH), 0))
    expected = oracle(mixer, dict(module.named_parameters()), x_TD)
    torch.testing.assert_close(y_BTD[0], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_shared_attention_reads_what_the_owner_published() -> None:
    """Attention with another layer's keys and values is attention with its own where the projections are equal."""
    torch.manual_seed(0)
    owner = Attn(heads=3, kv="own").build(WIDTH, "torch").build().double()
    reader = Attn(heads=3, kv="shared").build(WIDTH, "torch").build().double()
    reader.queries.load_state_dict(owner.queries.state_dict())
    reader.output.load_state_dict(owner.output.state_dict())
    x_BTD = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    at = Pass(torch.arange(LENGTH), 0)
    expected, _ = owner(x_BTD, None, at)
    y_BTD, _ = reader(x_BTD, None, at)
    torch.testing.assert_close(y_BTD, expected)
    assert not any("key" in name or "value" in name for name, _ in reader.named_parameters())


def test_a_window_keeps_a_ring_and_blocks_from_four_windows_on() -> None:
    mixer = Attn(heads=2, window=8)
    assert mixer.cost(WIDTH, 100).state_bytes == mixer.cost(WIDTH, 10_000).state_bytes == 2 * 8 * WIDTH * 4
    pairs = [
        (mixer.cost(WIDTH, length).flops - 8 * length * WIDTH * WIDTH) // (4 * WIDTH)
        for length in (31, 32, 33)
    ]
    assert pairs == [31 * 31, 64 + 3 * 128, 64 + 4 * 128]


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        (Attn(heads=5), "heads 5 does not divide width 24"),
        (Attn(heads=4, kv=Form("gqa", (3,))), "3 key/value heads do not divide 4"),
        (Attn(heads=8, head_dim=3), "even head_dim"),
        (Attn(kv="own", window=8), "no window"),
    ],
)
def test_illegal_genes_are_named(mixer: Attn, words: str) -> None:
    reason = mixer.why_illegal(WIDTH)
    assert reason is not None
    assert words in reason


def test_one_canonical_form_for_one_model() -> None:
    assert Attn(heads=4, kv=Form("gqa", (4,)), head_dim=32).canonical(128) == Attn()
    assert Attn(heads=1, kv="mqa").canonical(32) == Attn()
    assert Attn(heads=4, kv=Form("gqa", (1,))).canonical(64) == Attn(heads=4, kv="mqa")


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        (Attn(sink=Form("tokens", (4,))), Attn()),
        (Attn(pos="none", theta=5.0, rotary=0.5), Attn(pos="none")),
        (Attn(pos="alibi", theta=5.0), Attn(pos="alibi")),
        (Attn(lambda_init=0.5), Attn()),
        (Attn(heads=4, diff="full", out_norm="rms"), Attn(heads=4, diff="full")),
        (Attn(kv="shared", kv_shift="token"), Attn(kv="shared")),
        (Attn(kv=Form("mla", (32, 8)), rotary=0.5), Attn(kv=Form("mla", (32, 8)))),
    ],
    ids=str,
)
def test_genes_without_effect_are_dropped(mixer: Attn, expected: Attn) -> None:
    assert mixer.canonical(128) == expected.canonical(128)


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        (Attn(kv=Form("mla", (8, 3))), "say an even rope_dim, or pos=none"),
        (Attn(kv=Form("mla", (8, 4)), qk_norm="rms"), "takes no qk_norm=rms"),
        (Attn(kv=Form("mla", (8, 4)), pos=Form("relative", (4,))), "takes no pos=relative(4)"),
        (Attn(dilation=2), "dilation=2 is of a window"),
        (Attn(kv="own", pos="lrpe"), "needs the same turn in every layer"),
        (Attn(kv="shared", meta=2), "say it at kv=own"),
        (Attn(kv="reuse", pos="carope"), "use rope"),
        (Attn(score="relu", sink="learned"), "no denominator for sink=learned"),
        (Attn(meta=2, pos="xpos"), "meta=2 tokens have none"),
        (Attn(heads=3, diff="full"), "diff=full pairs heads"),
        (Attn(heads=4, diff=Form("shared", (2,)), query_rank=8), "no query_rank=8"),
        (Attn(heads=1, headmix="static"), "say more heads"),
        (
            Attn(mask=PREFIX, window=4),
            "mask=prefix(5) is of attention to every token, so it takes no window=4",
        ),
        (Attn(mask=PREFIX, sparse=Form("strided", (4,))), "so it takes no sparse=strided(4)"),
        (Attn(mask=PREFIX, score="local_linear"), "score=local_linear is of earlier tokens"),
        (Attn(mask=PREFIX, forget="head"), "forget=head is what is left of an earlier token"),
        (Attn(mask=PREFIX, pos="alibi"), "use rope, relative(n) or none"),
        (Attn(mask=PREFIX, query="learned", pos="none"), "takes no mask=prefix(5)"),
        (Attn(mask=PREFIX, kv=Form("vq", (4,)), pos="none"), "say mask=causal"),
    ],
)
def test_genes_that_do_not_go_together_are_named_with_the_way_out(mixer: Attn, words: str) -> None:
    reason = mixer.why_illegal(WIDTH)
    assert reason is not None
    assert words in reason


def test_published_architectures_read_as_their_papers() -> None:
    texts = {
        "fox_pro": "lm(12 * (fox_pro + swiglu), width=512)",
        "aaren": "lm(6 * (aaren + mlp), width=256)",
        "composite": "lm(8 * (attn(kv=gqa(2), theta=500000) + 2 * swiglu(expand=4)), width=512)",
        "mobilellm_ls": "lm(20 * (2 @ (attn(heads=6, kv=gqa(2)) + swiglu)), width=288)",
        "mfa_kr": "lm(12 * (attn(head_dim=128, kv=reuse, query_rank=256) + swiglu), width=512)",
        "diff": "lm(12 * (attn(diff=full) + swiglu), width=512)",
        "swat": "lm(12 * (attn(window=1024, pos=alibi_rope, score=sigmoid) + swiglu), width=512)",
    }
    assert {name: str(preset(name, "small")) for name in texts} == texts
