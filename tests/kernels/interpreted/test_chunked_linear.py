"""The linear family in Triton against the recurrence in float64: every decay and rule, with every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tolerance import assert_agree, assert_close
from torch import Tensor

from mixforge.kernels import chunked_linear_step_triton, chunked_linear_triton
from mixforge.kernels.chunked_linear import chunked_linear_reference, linear_step
from mixforge.kernels.chunked_linear_step_triton import linear_step_triton
from mixforge.kernels.chunked_linear_triton import chunked_linear_triton as run
from mixforge.kernels.launch import recording

DECAYS = ("none", "head", "scalar", "channel")
RULES = ("add", "delta")
# Sums of decays are differenced in float32.
RATIO = 1e-5
# The gradient of a head's decay is one number, a difference of two sums over all tokens.
OF_DECAY = 1e-4


def draw(
    decay: str,
    rule: str,
    length: int = 65,
    *,
    batch: int = 1,
    key_heads: int = 1,
    value_heads: int = 1,
    key_dim: int = 16,
    value_dim: int = 16,
    sequences: int | None = None,
    reach: float = 3.0,
    alike: float = 1.0,
) -> list[Tensor | None]:
    """Random inputs, unit keys; `alike` moves the keys towards one another, `reach` bounds the log decays."""
    dice = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, length, key_heads, key_dim, generator=dice) for _ in range(2))
    v = torch.randn(batch, length, value_heads, value_dim, generator=dice)
    state = torch.randn(sequences or batch, value_heads, key_dim, value_dim, generator=dice)
    shapes = {"head": (value_heads,), "scalar": v.shape[:3], "channel": (*v.shape[:3], key_dim)}
    g = None if decay == "none" else -reach * torch.rand(shapes[decay], generator=dice)
    beta = 2 * torch.rand(v.shape[:3], generator=dice) if rule == "delta" else None
    return [q, torch.nn.functional.normalize(k + alike, dim=-1), v, g, beta, state]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 13, 63, 64, 65, 200])
def test_equals_the_recurrence(decay: str, rule: str, length: int) -> None:
    assert_agree(run, chunked_linear_reference, draw(decay, rule, length), RATIO, gradient_3=OF_DECAY)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [13, 64, 130])
def test_a_scan_that_makes_the_output(
    decay: str, rule: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are programs enough; three value heads to a key head, more than one block of values."""
    monkeypatch.setattr(chunked_linear_triton, "ENOUGH", 1)
    inputs = draw(decay, rule, length, batch=2, value_heads=3, key_dim=24, value_dim=33)
    assert_agree(run, chunked_linear_reference, inputs, RATIO, gradient_3=OF_DECAY)
    with torch.no_grad():
        for found, expected in zip(run(*inputs), chunked_linear_reference(*inputs), strict=True):
            assert_close("without gradients", found, expected)
    bounds = torch.tensor([0, 5, length - 5, length])
    forms = [partial(form, cu_seqlens=bounds) for form in (run, chunked_linear_reference)]
    inputs = draw(decay, rule, length, sequences=3, value_heads=2)
    assert_agree(*forms, inputs, RATIO, gradient_3=OF_DECAY)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_recurrence_with_odd_sizes(decay: str, rule: str) -> None:
    """Three value heads to a key head, a batch of 3, dims that are no powers of two and more than one block."""
    inputs = draw(decay, rule, 70, batch=3, key_heads=1, value_heads=3, key_dim=24, value_dim=33)
    assert_agree(run, chunked_linear_reference, inputs, RATIO, gradient_3=OF_DECAY)


@pytest.mark.parametrize(("decay", "rule"), [("scalar", "delta"), ("channel", "delta"), ("none", "add")])
def test_equals_the_recurrence_over_many_chunks(decay: str, rule: str) -> None:
    inputs = draw(decay, rule, 200, value_heads=2, key_heads=2, key_dim=64, value_dim=64)
    assert_agree(run, chunked_linear_reference, inputs, RATIO, gradient_3=OF_DECAY)


@pytest.mark.parametrize("decay", DECAYS)
def test_more_key_channels_than_a_kernel_takes(decay: str) -> None:
    """A sum over groups of them; 3 value heads to a key head, and a step whose state is left in its place."""
    inputs = draw(decay, "add", 17, key_heads=2, value_heads=6, key_dim=273, value_dim=5)
    assert_agree(run, chunked_linear_reference, inputs, RATIO, gradient_3=OF_DECAY)
    q, k, v, g, _, state = inputs
    now = g if g is None or g.dim() == 1 else g[:, 0]
    one = [q[:, 0], k[:, 0], v[:, 0], now, None]
    expected, after = linear_step(*one, state)
    with torch.no_grad():
        o, found = linear_step_triton(*one, state)
    assert found is state
    assert_close("output", o, expected)
    assert_close("state", found, after)


@pytest.mark.parametrize("decay", DECAYS)
def test_keys_whose_state_no_kernel_holds(decay: str) -> None:
    """Under rule delta: blocks of keys and of values, three chunks; packed, without a first state."""
    inputs = draw(decay, "delta", 130, key_dim=150, value_dim=20)
    assert_agree(run, chunked_linear_reference, inputs, RATIO, gradient_3=OF_DECAY)
    inputs = draw(decay, "delta", 70, key_dim=150, sequences=2, key_heads=1, value_heads=2)
    forms = [partial(form, cu_seqlens=torch.tensor([0, 65, 70])) for form in (run, chunked_linear_reference)]
    assert_agree(*forms, [*inputs[:-1], None], RATIO, gradient_3=OF_DECAY)


@torch.no_grad()
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("keys", [150, 300])
def test_step_over_wide_keys(decay: str, keys: int) -> None:
    inputs = draw(decay, "delta", 1, batch=2, value_heads=2, key_dim=keys, value_dim=21)
    q, k, v, g, beta, state = inputs
    given = (q[:, 0], k[:, 0], v[:, 0], g if g is None or g.dim() == 1 else g[:, 0], beta[:, 0])
    expected, after = linear_step(*given, state.clone())
    actual, same = linear_step_triton(*given, state)
    assert same is state
    assert_close("o", actual, expected)
    assert_close("state", state, after)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunked_linear_step_triton.one_step, (*given, state), test_utils=checks)
    torch.library.opcheck(chunked_linear_triton.forward, (*inputs, None, True), test_utils=checks)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_do_not_see_one_another(decay: str, rule: str) -> None:
    bounds = torch.tensor([0, 15, 80, 90])
    inputs = draw(decay, rule, 90, sequences=3, value_heads=2)
    forms = [partial(form, cu_seqlens=bounds) for form in (run, chunked_linear_reference)]
    assert_agree(*forms, inputs, RATIO, gradient_3=OF_DECAY)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", ["head", "scalar", "channel"])
def test_decays_that_are_constants(decay: str, rule: str) -> None:
    """They get no gradient, and the others the same."""
    inputs = draw(decay, rule, 70, key_heads=1, value_heads=2, key_dim=24)
    given = [x if x is None else x.requires_grad_() for x in inputs]
    wanted = [x for i, x in enumerate(given) if i != 3 and x is not None]
    expected = torch.autograd.grad(run(*given)[0].sum(), wanted)
    constant = [x.detach() if i == 3 else x for i, x in enumerate(given)]
    actual = torch.autograd.grad(run(*constant)[0].sum(), wanted)
    for found, right in zip(actual, expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", ["head", "scalar"])
def test_decays_of_nothing_and_of_everything(decay: str, rule: str) -> None:
    """A token that keeps all beside one that keeps e^-1000 of what was before."""
    inputs = draw(decay, rule, 65)
    g = inputs[3]
    assert g is not None
    g.fill_(-1000.0 if decay == "head" else 0.0)
    if decay == "scalar":
        g[:, 5::7] = -1000.0
    assert_agree(run, chunked_linear_reference, inputs, 3e-5, gradient_3=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_channel_decays_at_their_floor(rule: str) -> None:
    inputs = draw("channel", rule, 65)
    assert inputs[3] is not None
    inputs[3].fill_(-5.0)
    assert_agree(run, chunked_linear_reference, inputs, RATIO, gradient_3=OF_DECAY)


@pytest.mark.parametrize("rule", RULES)
def test_channel_decays_at_their_floor_with_large_gradients(rule: str) -> None:
    """A last chunk that is not full: no row beyond its end may scale what is inside."""
    inputs = draw("channel", rule, 48, value_dim=32)
    assert inputs[3] is not None
    inputs[3].fill_(-5.0)
    assert_agree(
        lambda *given: 1000 * run(*given)[0],
        lambda *given: 1000 * chunked_linear_reference(*given)[0],
        inputs, RATIO, gradient_3=OF_DECAY,
    )  # fmt: skip


@pytest.mark.parametrize("decay", DECAYS)
def test_keys_that_resemble_one_another(decay: str) -> None:
    """With beta up to 2: where a Neumann series for the triangular system is off by 1e10."""
    inputs = draw(decay, "delta", 64, alike=5.0, reach=0.1)
    assert_agree(run, chunked_linear_reference, inputs, 2e-4 if decay == "none" else 1e-4)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_a_prefix_does_not_see_what_follows(decay: str, rule: str) -> None:
    inputs = draw(decay, rule, 70)
    other = [x if x is None or x.dim() == 1 else x.clone() for x in inputs]
    for x in other[:5]:
        if x is not None and x.dim() > 1:
            x[:, 40:] = x[:, 40:] * 0.5
    assert torch.equal(run(*inputs)[0][:, :40], run(*other)[0][:, :40])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_step(decay: str, rule: str) -> None:
    q, k, v, g, beta, state = draw(decay, rule, 1, batch=3, value_heads=2, key_dim=24, value_dim=33)
    now = g if g is None or g.dim() == 1 else g[:, 0]
    assert not any(x is None for x in (q, k, v, state))
    given = (q[:, 0], k[:, 0], v[:, 0], now, None if beta is None else beta[:, 0])
    with torch.no_grad():
        expected, after = linear_step(*given, state.clone())
        actual, same = linear_step_triton(*given, state)
    assert same is state
    assert_close("o", actual, expected)
    assert_close("state", state, after)


def test_a_step_leaves_the_state_as_it_was_where_gradients_are_on() -> None:
    q, k, v, g, beta, state = draw("scalar", "delta", 1, batch=2, value_heads=2, key_dim=24, value_dim=33)
    given = [x[:, 0] for x in (q, k, v, g, beta)]
    before = state.clone()
    o, after = linear_step_triton(*given, state)
    assert torch.equal(state, before)
    expected, right = linear_step(*given, state)
    assert_close("o", o, expected)
    assert_close("state", after, right)


@torch.no_grad()
def test_step_over_some_columns_of_a_state() -> None:
    """Those beside them stay as they are. Rows that are not at one distance are refused."""
    q, k, v, g, beta, state = draw("scalar", "delta", 1, batch=2, value_heads=2, key_dim=24, value_dim=33)
    given = [x[:, 0] for x in (q, k, v, g, beta)]
    beside = torch.randn(2, 2, 24, 9)
    wide = torch.cat([beside, state, beside], -1)
    expected, after = linear_step(*given, state)
    actual, _ = linear_step_triton(*given, wide[..., 9:42])
    assert_close("o", actual, expected)
    assert_close("state", wide[..., 9:42], after)
    assert torch.equal(wide[..., :9], beside)
    assert torch.equal(wide[..., 42:], beside)
    with pytest.raises(ValueError, match="some of the columns"):
        linear_step_triton(*given, state.mT.contiguous().mT)


def test_step_gives_gradients_where_they_are_wanted() -> None:
    q, k, v, g, beta, state = draw("scalar", "delta", 1)

    def with_form(step: object) -> object:
        return lambda q, k, v, g, b, s: step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], b[:, 0], s)

    assert_agree(with_form(linear_step_triton), with_form(linear_step), [q, k, v, g, beta, state], RATIO)


@pytest.mark.parametrize(("decay", "rule"), [("none", "add"), ("head", "delta"), ("channel", "delta")])
def test_registered_with_torch(decay: str, rule: str) -> None:
    inputs = [x if x is None else x.requires_grad_() for x in draw(decay, rule, 20)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunked_linear_triton.forward, (*inputs, None, True), test_utils=checks)
    packed = (*draw(decay, rule, 20, sequences=2), torch.tensor([0, 7, 20]), False)
    torch.library.opcheck(chunked_linear_triton.forward, packed, test_utils=checks)
    q, k, v, now, beta, state = (x if x is None else x.detach() for x in inputs)
    q, k, v, beta = (x if x is None else x[:, 0] for x in (q, k, v, beta))
    now = now if now is None or now.dim() == 1 else now[:, 0]
    for kept in (state, torch.cat([state, state], -1)[..., : state.shape[3]]):
        torch.library.opcheck(
            chunked_linear_step_triton.one_step, (q, k, v, now, beta, kept), test_utils=checks
        )


@pytest.mark.parametrize("decay", ["head", "scalar", "channel"])
def test_decays_and_step_sizes_of_half_precision(decay: str) -> None:
    """They count as the numbers that they are, and have gradients of their dtype."""
    wide = [x if x is None else x.bfloat16().float() for x in draw(decay, "delta", 70)]
    half = [x if i < 3 else x.bfloat16() for i, x in enumerate(wide)]
    made = []
    for inputs in (wide, half):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o, last = chunked_linear_triton.chunked_linear_triton(*leaves)
        grads = torch.autograd.grad(o.square().sum() + last.square().sum(), leaves)
        assert [x.dtype for x in grads] == [x.dtype for x in inputs]
        made.append([o, last, *grads])
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(other, one.to(other.dtype), rtol=0, atol=0)


def test_compiles_as_one_graph() -> None:
    inputs = draw("scalar", "delta", 20)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_agree(compiled, chunked_linear_reference, inputs, RATIO, gradient_3=OF_DECAY)
    leaves = [(x if i < 3 else x.bfloat16()).requires_grad_() for i, x in enumerate(inputs)]
    made = [torch.autograd.grad(form(*leaves)[0].square().sum(), leaves) for form in (compiled, run)]
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_launches() -> None:
    """A call is two launches and three backwards, two more with a system; less where one makes what two would."""
    for rule, target, batch, dim, expected, backwards in (
        ("add", "sm_90", 1, 65, 2, 3),
        ("add", "sm_90", 1, 64, 2, 2),
        ("add", "sm_90", 128, 64, 1, 2),
        ("add", "sm_80", 128, 64, 2, 3),
        ("add", "sm_80", 128, 32, 2, 2),
        ("delta", "sm_90", 1, 65, 4, 3),
        ("delta", "sm_90", 1, 64, 3, 3),
        ("delta", "sm_90", 128, 65, 3, 3),
        ("delta", "sm_90", 128, 64, 2, 3),
        ("delta", "sm_80", 128, 65, 4, 3),
        ("delta", "sm_80", 128, 64, 3, 3),
    ):
        with recording(target) as recorded:
            drawn = draw("scalar", rule, 130, batch=batch, key_dim=dim)
            drawn = [None if x is None else x.to("meta") for x in drawn]
            inputs = [x if x is None or i in (3, 4, 5) else x.bfloat16() for i, x in enumerate(drawn)]
            o, last, *kept = chunked_linear_triton.forward_kernels(*inputs, None, True)
            assert len(recorded.launches) == expected
            chunked_linear_triton.backward_kernels(*inputs[:5], None, *kept, o, last)
            assert len(recorded.launches) == expected + backwards
            none = chunked_linear_triton.forward_kernels(*inputs, None, False)[2:]
            assert [x.numel() for x in none] == [0] * 8


def test_bad_input() -> None:
    q, k, v, g, beta, state = draw("scalar", "delta", 20, value_heads=2)
    assert not any(x is None for x in (q, k, v, state))
    for given, message in [
        ((q[0], k, v), r"q has shape \[20, 1, 16\]; it must be \[batch, time, heads, dim\]"),
        ((q.double(), k, v), "q is torch.float64 and v is torch.float32; they must have one dtype"),
        ((q.half(), k, v), "q is torch.float16 and v is torch.float32; they must have one dtype"),
        ((q[:, :0], k[:, :0], v[:, :0]), "length of 0"),
        ((q, k[:, :5], v), r"k has shape \[1, 5, 1, 16\]; it must be \["),
        ((q, k, v[:, :5]), r"v has shape \[1, 5, 2, 16\]"),
        ((q, k, v, g[:, :5]), "decay has shape"),
        ((q, k, v, 1 + g.abs()), "decay must be at most 0"),
        ((q, k, v, g, beta[:, :5]), "beta has shape"),
        ((q, k, v, g, beta, state[:, :1]), r"state has shape \[1, 1, 16, 16\]; it must be \[1, 2, 16, 16\]"),
        ((q, k, v, g, beta, state.to("meta")), "state is on meta and q on cpu"),
        ((q, k, v, g, beta, None, torch.tensor([0.0, 20.0])), "cu_seqlens must be int32 or int64"),
        ((q, k, v, g, beta, None, torch.tensor([0, 25])), "cu_seqlens must rise from 0 to the length 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*given)
    below = torch.full((*v.shape[:3], q.shape[3]), -6.0)
    with pytest.raises(ValueError, match=r"decay must lie in \[-5, 0\], got -6 to -6"):
        run(q, k, v, below, beta)
    with pytest.raises(ValueError, match=r"q is torch\.float64; backend='triton' takes float32"):
        run(q.double(), k.double(), v.double())
    three = torch.cat([q, q, q], 2)
    with pytest.raises(ValueError, match="2 value heads are no multiple of 3 key heads"):
        run(three, three, v)
