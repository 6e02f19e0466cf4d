"""The matrix recurrence: every decay and rule against a float64 loop, with every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixforge.kernels import chunked_linear
from mixforge.kernels.chunked_linear import FORMS, form, linear_step, matmul_flops
from mixforge.kernels.norm import unit_norm

DECAYS = ("none", "head", "scalar", "channel")
RULES = ("add", "delta")
MEMBERS = list(itertools.product(DECAYS, RULES))
# Chunks are longer for wider heads.
SIZES = [(*member, key_dim) for member in MEMBERS for key_dim in (5, 65)]
Inputs = list[Tensor | None]
NAMES = ("q", "k", "v", "decay", "beta", "state")


def draw(
    decay: str,
    rule: str,
    length: int,
    *,
    batch: int = 2,
    key_heads: int = 2,
    value_heads: int = 4,
    key_dim: int = 5,
    value_dim: int = 7,
    dtype: torch.dtype = torch.float64,
    reach: float = 3.0,
    alike: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs, unit keys; `alike` moves the keys towards one another, `reach` bounds scalar log decays."""
    dice = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=dice, dtype=torch.float64)

    q = normal(batch, length, key_heads, key_dim)
    k = torch.nn.functional.normalize(normal(batch, length, key_heads, key_dim) + alike, dim=-1)
    v = normal(batch, length, value_heads, value_dim)
    g = {
        "none": None,
        "head": -reach * uniform(value_heads),
        "scalar": -reach * uniform(batch, length, value_heads),
        "channel": -5 * uniform(batch, length, value_heads, key_dim),
    }[decay]
    beta = 2 * uniform(batch, length, value_heads) if rule == "delta" else None
    state = normal(batch, value_heads, key_dim, value_dim)
    return [None if x is None else x.to(dtype) for x in (q, k, v, g, beta, state)]


def oracle(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor) -> Tensor:
    """The recurrence as it is written in the papers, one head at a time. Returns o and the state, flat."""
    batch, length, heads, _ = v.shape
    group = heads // q.shape[2]
    outputs, states = [], []
    for b, h in itertools.product(range(batch), range(heads)):
        s = state[b, h]
        for t in range(length):
            query, key, value = q[b, t, h // group], k[b, t, h // group], v[b, t, h]
            if g is not None:
                now = g[h] if g.dim() == 1 else g[b, t, h]
                s = torch.diag(torch.exp(now.expand(key.shape))) @ s
            if beta is not None:
                value = beta[b, t, h] * (value - s.T @ key)
            s = s + torch.outer(key, value)
            outputs.append(s.T @ query)
        states.append(s)
    o = torch.stack(outputs).view(batch, heads, length, -1).transpose(1, 2)
    return torch.cat([o.flatten(), torch.stack(states).flatten()])


def run(operation: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor | float | None]) -> Tensor:
    o, state = operation(*inputs)
    return torch.cat([o.flatten(), state.flatten()])


def results(function: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and final state, and the gradient of every input under a fixed random weight of both."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y = function(leaves)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    given = {name: x for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    grads = torch.autograd.grad((y * weight).sum(), list(given.values()))
    return {"o and state": y.detach(), **dict(zip(given, grads, strict=True))}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        assert error < bound, f"{name}: relative error {error:.1e} over {bound:.0e}"


def in_float64(inputs: Inputs) -> Inputs:
    return [None if x is None else x.double() for x in inputs]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
def test_equals_the_papers_recurrence(decay: str, rule: str, backend: str) -> None:
    inputs = draw(decay, rule, 37, batch=1, key_heads=1, value_heads=2, key_dim=3, value_dim=2)
    expected = results(lambda x: oracle(*x), inputs)  # type: ignore[arg-type]
    assert_near(results(lambda x: run(FORMS[backend], x), inputs), expected, 1e-12)


@pytest.mark.parametrize("length", [1, 13, 63, 64, 65, 200])
@pytest.mark.parametrize(("decay", "rule", "key_dim"), SIZES)
def test_chunks_equal_the_loop_at_every_length(decay: str, rule: str, key_dim: int, length: int) -> None:
    inputs = draw(decay, rule, length, key_dim=key_dim)
    expected = results(lambda x: run(FORMS["reference"], x), inputs)
    assert_near(results(lambda x: run(FORMS["torch"], x), inputs), expected, 1e-11)


@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
def test_float32_is_near_the_float64_loop(decay: str, rule: str) -> None:
    inputs = draw(decay, rule, 200, key_dim=33, value_dim=17, dtype=torch.float32)
    expected = results(lambda x: run(FORMS["reference"], x), in_float64(inputs))
    actual = results(lambda x: run(FORMS["torch"], x), inputs)
    # The one decay of a head is a sum over all tokens of terms that cancel.
    assert_near(
        {"head": actual.pop("decay", torch.ones(1))}, {"head": expected.pop("decay", torch.ones(1))}, 5e-5
    )
    assert_near(actual, expected, 3e-6)


@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
def test_gradcheck(decay: str, rule: str) -> None:
    inputs = draw(decay, rule, 34, batch=1, key_heads=1, value_heads=2, key_dim=2, value_dim=3, reach=0.5)
    leaves = tuple(None if x is None else x.requires_grad_() for x in inputs)
    if decay == "channel":
        assert leaves[3] is not None
        leaves[3].data.clamp_(-4.9, -0.1)
    assert torch.autograd.gradcheck(FORMS["torch"], leaves, fast_mode=True)


@pytest.mark.parametrize("alike", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_keys_that_resemble_one_another(decay: str, alike: float) -> None:
    """With beta near 2 and equal keys a series for the triangular inverse explodes; substitution does not."""
    inputs = draw(decay, "delta", 130, key_dim=16, alike=alike, reach=0.01, dtype=torch.float32)
    if inputs[3] is not None and decay == "channel":
        inputs[3] = inputs[3] * 1e-3
    expected = results(lambda x: run(FORMS["reference"], x), in_float64(inputs))
    actual = results(lambda x: run(FORMS["torch"], x), inputs)
    assert_near({"o and state": actual["o and state"]}, {"o and state": expected["o and state"]}, 1e-5)
    assert_near({"v": actual["v"], "k": actual["k"]}, {"v": expected["v"], "k": expected["k"]}, 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_decays_from_nothing_to_everything(rule: str) -> None:
    """Tokens that forget all beside tokens that forget nothing: exact, with finite gradients."""
    inputs = draw("scalar", rule, 100, key_dim=8, dtype=torch.float32)
    g = inputs[3]
    assert g is not None
    g[:, ::7], g[:, 1::7], g[:, 2::7], g[:, 50:60] = -1000.0, 0.0, -1e-6, -90.0
    expected = results(lambda x: run(FORMS["reference"], x), in_float64(inputs))
    actual = results(lambda x: run(FORMS["torch"], x), inputs)
    assert_near({"o and state": actual["o and state"]}, {"o and state": expected["o and state"]}, 1e-6)
    assert_near(actual, expected, 1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("level", [-5.0, -1e-6, 0.0])
def test_channels_at_the_ends_of_their_range(rule: str, level: float) -> None:
    inputs = draw("channel", rule, 100, key_dim=8, dtype=torch.float32)
    assert inputs[3] is not None
    inputs[3] = torch.full_like(inputs[3], level)
    inputs[3][..., ::3] = -5.0
    inputs[3][:, ::2, :, 1::3] = 0.0
    expected = results(lambda x: run(FORMS["reference"], x), in_float64(inputs))
    assert_near(results(lambda x: run(FORMS["torch"], x), inputs), expected, 2e-5)


@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
def test_a_state_carries_a_sequence_across_pieces(decay: str, rule: str) -> None:
    whole = draw(decay, rule, 90)
    expected, final = FORMS["torch"](*whole)
    state, pieces = whole[5], []
    for start, end in ((0, 1), (1, 40), (40, 90)):
        piece = [x if x is None or x.dim() == 1 else x[:, start:end] for x in whole[:5]]
        o, state = FORMS["torch"](*piece, state)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("slab", [1, 400])
@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
def test_slabs_change_nothing(decay: str, rule: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the thirteen chunks at a time, and three, so that the last slab is shorter."""
    inputs = draw(decay, rule, 200)
    expected = results(lambda x: run(FORMS["torch"], x), inputs)
    monkeypatch.setattr(chunked_linear, "SLAB", slab)
    assert_near(results(lambda x: run(FORMS["torch"], x), inputs), expected, 1e-12)
    # Without gradients nothing is kept, and slabs share more room.
    torch.testing.assert_close(run(FORMS["torch"], inputs), expected["o and state"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("slab", [1, 400])
@pytest.mark.parametrize("length", [96, 100])
@pytest.mark.parametrize("rule", RULES)
def test_constant_decays_are_those_of_every_token(
    rule: str, length: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_linear, "SLAB", slab)
    *qkv, decay, beta, state = draw("head", rule, length)
    assert decay is not None
    assert qkv[2] is not None
    every = decay.expand(*qkv[2].shape[:3])

    def pass_with(given: Tensor) -> dict[str, Tensor]:
        return results(lambda x: run(FORMS["torch"], [*x[:3], given, *x[4:]]), [*qkv, None, beta, state])

    # What is made in inference mode has to serve an adjoint as well.
    with torch.inference_mode():
        o = run(FORMS["torch"], [*qkv, decay, beta, state])
    torch.testing.assert_close(o, pass_with(every)["o and state"], rtol=1e-12, atol=1e-12)
    assert_near(pass_with(decay), pass_with(every), 1e-12)


@pytest.mark.parametrize("decay", ["none", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_infinite_above_the_diagonal_is_not_read(decay: str, rule: str) -> None:
    inputs = draw(decay, rule, 16, key_dim=64, dtype=torch.float32)
    q, k, v, g, _, _ = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    if g is not None:
        # The first query by the last key, whose scaling is e^75.
        inputs[0], inputs[1], inputs[3] = 1e5 * q.abs(), 10 * k.abs(), torch.full_like(g, -5.0)
    else:
        q[:, 0], k[:, -1], v[:, -1] = 1e20, 1e20, 0.0
        inputs[5] = torch.zeros(v.shape[0], v.shape[2], 64, v.shape[3])
    if rule == "delta":
        inputs[4] = torch.full_like(v[..., 0], 0.01)
    o, _ = FORMS["torch"](*inputs)
    expected, _ = FORMS["reference"](*in_float64(inputs))
    assert_near({"o": o[:, :-1]}, {"o": expected[:, :-1]}, 1e-4)


@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
def test_a_later_token_leaves_earlier_outputs_as_they_were(decay: str, rule: str) -> None:
    inputs = draw(decay, rule, 80, dtype=torch.float32)
    before, _ = FORMS["torch"](*inputs)
    changed = [x if x is None or x.dim() == 1 or i == 5 else x.clone() for i, x in enumerate(inputs)]
    for x in changed[:5]:
        if x is not None and x.dim() > 1:
            x[:, 41:] *= 0.3
    after, _ = FORMS["torch"](*changed)
    assert torch.equal(before[:, :41], after[:, :41])


@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
@pytest.mark.parametrize("grad", [False, True])
def test_steps_equal_the_loop(decay: str, rule: str, grad: bool) -> None:
    q, k, v, g, beta, state = draw(decay, rule, 12)
    assert q is not None
    assert k is not None
    assert v is not None
    assert state is not None
    expected, final = FORMS["reference"](q, k, v, g, beta, state)
    first = state.clone()
    with torch.set_grad_enabled(grad):
        for t in range(12):
            now = g if g is None or g.dim() == 1 else g[:, t]
            given = state
            o, state = linear_step(
                q[:, t], k[:, t], v[:, t], now, None if beta is None else beta[:, t], given
            )
            assert (state is given) is not grad
            torch.testing.assert_close(o, expected[:, t])
            if t == 0 and grad:
                assert torch.equal(given, first)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("length", [1, 30, 100])
@pytest.mark.parametrize(("decay", "rule", "key_dim"), SIZES)
def test_flops_equal_the_counter(decay: str, rule: str, key_dim: int, length: int, grad: bool) -> None:
    inputs = draw(decay, rule, length, batch=1, key_dim=key_dim, dtype=torch.float32)
    leaves = [None if x is None else x.requires_grad_(grad) for x in inputs]
    with FlopCounterMode(display=False) as counter:
        FORMS["torch"](*leaves)
    expected = matmul_flops(
        length, key_heads=2, value_heads=4, key_dim=key_dim, value_dim=7, rule=rule, decay=decay
    )
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
def test_the_narrow_form_is_the_same(decay: str, rule: str) -> None:
    inputs = draw(decay, rule, 20)
    expected = FORMS["torch"](*inputs)
    torch.testing.assert_close(form("torch", rule, decay)(*inputs), expected, rtol=0, atol=0)
    assert form("reference", rule, decay) is FORMS["reference"]


def in_front(decay: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rule delta behind norms of queries and keys."""
    operation = form("torch", "delta", decay)
    return lambda q, k, *others: operation(0.3 * unit_norm(q), unit_norm(k), *others)


@pytest.mark.parametrize(("key_dim", "length"), [(5, 33), (65, 40)])
@pytest.mark.parametrize("decay", DECAYS)
def test_norms_inside_are_those_in_front(decay: str, key_dim: int, length: int) -> None:
    inputs = draw(decay, "delta", length, key_dim=key_dim, seed=key_dim)
    expected = results(lambda x: run(in_front(decay), x), inputs)
    inside = form("torch", "delta", decay)
    assert_near(results(lambda x: run(inside, [*x, 0.3]), inputs), expected, 1e-11)
    strided = [None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    assert_near(results(lambda x: run(inside, [*x, 0.3]), strided), expected, 1e-11)


@pytest.mark.parametrize(("key_dim", "length"), [(5, 33), (65, 40)])
@pytest.mark.parametrize("decay", DECAYS)
def test_gates_inside_are_those_in_front(decay: str, key_dim: int, length: int) -> None:
    """With a column of ones and without, gated and not."""
    operation = form("torch", "add", decay)
    inputs = draw(decay, "delta", length, key_dim=key_dim)
    assert inputs[2] is not None
    assert inputs[5] is not None
    wider = [*inputs[:5], torch.nn.functional.pad(inputs[5], (0, 1), value=0.5)]

    def in_front(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor) -> Tensor:
        dim = state.shape[-1] - v.shape[-1]
        written = beta[..., None] * torch.cat([v, torch.ones_like(v[..., :dim])], -1)
        return run(operation, [q, k, written, g, None, state])

    for given, is_summed in ((inputs, False), (wider, True)):
        expected = results(lambda x: in_front(*x), given)  # type: ignore[arg-type]
        inside = results(lambda x, is_summed=is_summed: run(operation, [*x, is_summed]), given)  # type: ignore[misc]
        assert_near(inside, expected, 1e-12)
    ungated = [*wider[:4], None, wider[5]]
    ones = torch.ones_like(inputs[2][..., 0])
    expected = results(lambda x: in_front(*x[:4], ones, x[5]), ungated)  # type: ignore[arg-type]
    assert_near(results(lambda x: run(operation, [*x, True]), ungated), expected, 1e-12)


def test_no_state_is_a_state_of_zeros() -> None:
    *inputs, state = draw("scalar", "delta", 40)
    assert state is not None
    for operation in FORMS.values():
        torch.testing.assert_close(operation(*inputs, None), operation(*inputs, torch.zeros_like(state)))


def test_bfloat16_keeps_its_state_in_float32() -> None:
    inputs = draw("scalar", "delta", 70, dtype=torch.bfloat16)
    for operation in FORMS.values():
        o, state = operation(*inputs)
        assert o.dtype == torch.bfloat16
        assert state.dtype == torch.float32


def test_final_state_shares_no_memory() -> None:
    inputs = draw("none", "add", 40)
    with torch.no_grad():
        o, state = FORMS["torch"](*inputs)
        kept, again = o.clone(), FORMS["torch"](*inputs)[1]
        state.zero_()
    assert torch.equal(o, kept)
    assert again.abs().sum() > 0


@pytest.mark.parametrize("operation", FORMS.values(), ids=FORMS.keys())
def test_refuses_what_it_cannot_run(operation: Callable[..., tuple[Tensor, Tensor]]) -> None:
    inputs = draw("channel", "add", 20)
    assert inputs[3] is not None
    with pytest.raises(ValueError, match=r"\[-5, 0\], got -5\.5 to"):
        operation(*inputs[:3], inputs[3].clamp(max=-0.1).index_fill(1, torch.tensor([3]), -5.5), None, None)
    with pytest.raises(ValueError, match=r"at most 0, got 0\.25"):
        operation(*inputs[:3], inputs[3].index_fill(1, torch.tensor([3]), 0.25), None, None)
    with pytest.raises(ValueError, match="4 value heads are no multiple of 3 key heads"):
        operation(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4, 4), None, None, None)
    for shape, name in (((0, 2, 1, 4), "batch"), ((1, 0, 1, 4), "length"), ((1, 2, 0, 4), "number of heads")):
        none = torch.ones(shape)
        with pytest.raises(ValueError, match=rf"q has a {name} of 0 \(shape .*\); it must be at least 1"):
            operation(none, none, none, None, None, None)
    one = torch.ones(1, 2, 1, 4)
    bounds = torch.empty(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"cu_seqlens is on meta and .* on cpu; put both on one device"):
        operation(one, one, one, None, None, None, bounds)


def test_a_step_refuses_a_state_of_another_shape() -> None:
    token = torch.ones(1, 2, 4)
    for state in (torch.zeros(2, 2, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 5)):
        with pytest.raises(ValueError, match=r"state has shape .*; it must be \[1, 2, 4, 4\]"):
            chunked_linear.linear_step(token, token, token, None, None, state)


# Dynamo makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("decay", "rule", "key_dim", "backend"),
    [
        ("head", "delta", 16, "aot_eager"),
        ("scalar", "add", 5, "aot_eager"),
        ("channel", "delta", 5, "eager"),
    ],
)
def test_compiles_as_one_graph(decay: str, rule: str, key_dim: int, backend: str) -> None:
    """Forward and backward; without views and writes in place for `aot_eager`, as compilers want it."""
    torch._dynamo.reset()
    compiled = torch.compile(form("torch", rule, decay), fullgraph=True, backend=backend)
    inputs = draw(decay, rule, 17, key_dim=key_dim)
    units = (0.3,) if rule == "delta" else ()
    expected = results(lambda x: run(in_front(decay) if units else FORMS["torch"], x), inputs)
    assert_near(results(lambda x: run(compiled, [*x, *units]), inputs), expected, 1e-11)


@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
def test_inputs_need_not_be_contiguous(decay: str, rule: str) -> None:
    inputs = draw(decay, rule, 64)
    expected = results(lambda x: run(FORMS["torch"], x), inputs)
    strided = [None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    assert_near(results(lambda x: run(FORMS["torch"], x), strided), expected, 1e-12)


def draw_packed(decay: str, rule: str, lengths: Sequence[int], *, key_dim: int = 5) -> tuple[Inputs, Tensor]:
    """Random inputs with a first state for each sequence, and where the sequences begin."""
    inputs = draw(decay, rule, sum(lengths), batch=1, key_dim=key_dim)
    inputs[5] = draw("none", "add", 1, batch=len(lengths), key_dim=key_dim, seed=1)[5]
    return inputs, torch.tensor([0, *itertools.accumulate(lengths)])


@pytest.mark.parametrize("slab", [200, 4096])
@pytest.mark.parametrize(("decay", "rule", "key_dim"), SIZES)
def test_packed_sequences(
    decay: str, rule: str, key_dim: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter than a chunk, as long, longer, and longer than a slab; with first states and without."""
    monkeypatch.setattr(chunked_linear, "SLAB", slab)
    inputs, bounds = draw_packed(decay, rule, (1, 31, 16, 90, 32, 5), key_dim=key_dim)
    expected = results(lambda x: run(FORMS["reference"], [*x, bounds]), inputs)
    assert_near(results(lambda x: run(FORMS["torch"], [*x, bounds]), inputs), expected, 1e-11)
    torch.testing.assert_close(
        run(FORMS["torch"], [*inputs, bounds.int()]), expected["o and state"], rtol=1e-10, atol=1e-10
    )
    inputs[5] = None
    expected = results(lambda x: run(FORMS["reference"], [*x, bounds]), inputs)
    assert_near(results(lambda x: run(FORMS["torch"], [*x, bounds]), inputs), expected, 1e-11)


@pytest.mark.parametrize(("decay", "rule"), MEMBERS)
def test_packed_sequences_do_not_see_one_another(decay: str, rule: str) -> None:
    """What is not a number in one of them, its first state included, leaves those beside it as they were."""
    inputs, bounds = draw_packed(decay, rule, (20, 33, 40))
    *_, v, _, _, state = inputs
    assert v is not None
    assert state is not None

    def outer(x: Inputs) -> Tensor:
        o, final = FORMS["torch"](*x, bounds)
        return torch.cat([o[:, :20].flatten(), o[:, 53:].flatten(), final[::2].flatten()])

    expected = results(outer, inputs)
    v[:, 20:53] = torch.nan
    state[1] = torch.nan
    actual = results(outer, inputs)
    torch.testing.assert_close(actual["o and state"], expected["o and state"], rtol=0, atol=0)
    for name in set(actual) - {"o and state"}:
        one, other = actual[name], expected[name]
        if name == "state":
            one, other = one[::2], other[::2]
        elif one.dim() > 1:
            one, other = (torch.cat([x[:, :20], x[:, 53:]], 1) for x in (one, other))
        elif name == "decay":
            continue
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# Dynamo makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("decay", "rule", "backend"),
    [*((*member, "aot_eager") for member in MEMBERS), ("channel", "delta", "eager")],
)
def test_packed_sequences_are_one_graph(decay: str, rule: str, backend: str) -> None:
    """The same for other bounds."""
    torch._dynamo.reset()
    compiled = torch.compile(FORMS["torch"], fullgraph=True, backend=backend)
    for lengths in ((3, 17, 1), (16, 1, 4)):
        inputs, bounds = draw_packed(decay, rule, lengths)
        expected = results(lambda x, bounds=bounds: run(FORMS["reference"], [*x, bounds]), inputs)  # type: ignore[misc]
        with torch.compiler.set_stance("fail_on_recompile" if lengths[0] == 16 else "default"):
            found = results(lambda x, bounds=bounds: run(compiled, [*x, bounds]), inputs)  # type: ignore[misc]
        assert_near(found, expected, 1e-11)
