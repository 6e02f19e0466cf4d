"""Recurrences with a removal, and with decays on both sides, in Triton against a float64 loop, with every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_agree, assert_close
from torch import Tensor

from mixforge.kernels import dplr, dplr_triton, twofold_linear
from mixforge.kernels.launch import recording

# Sums of decays are differenced in float32.
RATIO = 1e-5
# What a recurrence has beside its keys and values.
PARTS = {
    "removal and decay": ("removal", "decay"),
    "removal": ("removal",),
    "both decays": ("decay", "value_decay"),
}
ALL = {"nothing": (), "decay": ("decay",), "value decay": ("value_decay",)} | PARTS
ALL |= {
    "removal and value decay": ("removal", "value_decay"),
    "everything": ("removal", "decay", "value_decay"),
}


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    removal: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """S = (Diag(e^g) - b a^T) S Diag(e^h) + k v^T, o = S^T q, one token after the other."""
    outputs = []
    for t in range(q.shape[1]):
        if value_decay is not None:
            state = state * value_decay[:, t].exp()[..., None, :]
        kept = state if decay is None else decay[:, t].exp()[..., None] * state
        if removal is not None:
            a, b = removal[:, t].unbind(-2)
            kept = kept - torch.einsum("bhk,bhc,bhcv->bhkv", b, a, state)
        state = kept + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def run(*given: Tensor | None) -> tuple[Tensor, Tensor]:
    o, last, *_ = dplr_triton.forward(*given)
    return o, last


def draw(
    parts: tuple[str, ...],
    length: int,
    *,
    batch: int = 1,
    heads: int = 1,
    key_dim: int = 16,
    value_dim: int = 16,
    least: float = -3.0,
    alike: float = 1.0,
) -> list[Tensor | None]:
    """Random inputs, unit keys; `alike` moves the keys towards one another, `least` bounds the log decays."""
    dice = torch.Generator().manual_seed(0)
    cells = (batch, length, heads)
    q, k, a, rate, g = (torch.randn(*cells, key_dim, generator=dice) for _ in range(5))
    v, h = (torch.randn(*cells, value_dim, generator=dice) for _ in range(2))
    state = torch.randn(batch, heads, key_dim, value_dim, generator=dice)
    k, a = (F.normalize(x + alike, dim=-1) for x in (k, a))
    beside = {
        "decay": least * torch.sigmoid(g),
        "value_decay": least * torch.sigmoid(h),
        "removal": torch.stack([a, a * 1.5 * torch.sigmoid(rate)], -2),
    }
    return [
        q,
        k,
        v,
        *(beside[name] if name in parts else None for name in ("decay", "value_decay", "removal")),
        state,
    ]


@pytest.mark.parametrize("parts", ["removal and decay", "both decays"])
@pytest.mark.parametrize("length", [1, 13, 16, 17, 63, 65, 200])
def test_equals_the_recurrence(parts: str, length: int) -> None:
    assert_agree(run, recurrence, draw(PARTS[parts], length), RATIO)


@pytest.mark.parametrize("parts", ALL)
def test_equals_the_recurrence_with_odd_sizes(parts: str) -> None:
    """Dims that are no powers of two and more than one block of values, and for what a mixer has a batch of 3."""
    inputs = draw(ALL[parts], 19, batch=3 if parts in PARTS else 1, key_dim=24, value_dim=40)
    assert_agree(run, recurrence, inputs, RATIO)


@pytest.mark.parametrize("parts", ["removal and decay", "both decays"])
def test_equals_the_recurrence_with_wide_heads(parts: str) -> None:
    assert_agree(run, recurrence, draw(PARTS[parts], 33, key_dim=64, value_dim=64), RATIO)


@pytest.mark.parametrize("parts", PARTS)
def test_decays_of_nothing_and_at_their_floor(parts: str) -> None:
    """Channels that keep all and channels that keep e^-5, then all at the floor, with a last chunk that is not full."""
    inputs = draw(PARTS[parts], 40)
    for x in inputs[3:5]:
        if x is not None:
            x[..., ::2], x[..., 1::2] = 0.0, -5.0
            x[:, 20:] = -5.0
    large = [lambda *given, form=form: 1000 * form(*given)[0] for form in (run, recurrence)]
    assert_agree(*large, inputs, RATIO)


@pytest.mark.parametrize("parts", ["removal and decay", "removal"])
def test_keys_that_resemble_one_another(parts: str) -> None:
    """Where a Neumann series for the triangular system is off."""
    assert_agree(run, recurrence, draw(PARTS[parts], 48, alike=6.0, least=-0.05), 3e-5)


@pytest.mark.parametrize("parts", PARTS)
def test_a_prefix_does_not_see_what_follows(parts: str) -> None:
    inputs = draw(PARTS[parts], 40)
    other = [None if x is None else x.clone() for x in inputs]
    for x in other[:6]:
        if x is not None:
            x[:, 21:] *= 0.5
    assert torch.equal(run(*inputs)[0][:, :21], run(*other)[0][:, :21])


@pytest.mark.parametrize("parts", PARTS)
def test_the_forms_of_the_backend(parts: str) -> None:
    """What a mixer calls is the reference form in float64, also without a first state."""
    inputs = draw(PARTS[parts], 17)
    q, k, v, decay, _, removal, state = inputs
    module, given = (dplr, [q, k, v, decay, removal]) if removal is not None else (twofold_linear, inputs[:5])
    for first in ([state], []):
        assert_agree(module.form("triton"), module.form("reference"), [*given, *first], RATIO)


@pytest.mark.parametrize("parts", PARTS)
def test_step(parts: str) -> None:
    """In place; and where gradients are wanted, those of the equations."""
    q, k, v, decay, value_decay, removal, state = draw(
        PARTS[parts], 1, batch=3, heads=2, key_dim=24, value_dim=40
    )
    module, beside = (
        (dplr, [decay, removal]) if removal is not None else (twofold_linear, [decay, value_decay])
    )
    given = [x if x is None else x[:, 0] for x in (q, k, v, *beside)]
    assert_agree(module.step_form("triton"), module.step_form("torch"), [*given, state])
    with torch.no_grad():
        expected, after = module.step_form("torch")(*given, state.clone())
        actual, same = module.step_form("triton")(*given, state)
        assert same is state
        assert_close("o", actual, expected)
        assert_close("state", state, after)
        with pytest.raises(ValueError, match="it must be float32 and contiguous"):
            module.step_form("triton")(*given, state[:1].expand(3, -1, -1, -1))


def test_the_last_state_alone_has_gradients() -> None:
    def expected(*given: Tensor | None) -> Tensor:
        o, last = recurrence(*given)
        return last + 0 * o.sum()

    assert_agree(lambda *given: run(*given)[1], expected, draw(PARTS["removal and decay"], 20), RATIO)


@pytest.mark.parametrize("parts", ALL)
def test_registered_with_torch(parts: str) -> None:
    inputs = [x if x is None else x.requires_grad_() for x in draw(ALL[parts], 17)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(dplr_triton.forward, tuple(inputs), test_utils=checks)


def test_compiles_as_one_graph() -> None:
    q, k, v, decay, _, removal, state = draw(PARTS["removal and decay"], 20)
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(
        dplr_triton.dplr_triton, fullgraph=True, backend="aot_eager"
    )
    assert_agree(compiled, dplr.dplr_reference, [q, k, v, decay, removal, state], RATIO)


def test_launches() -> None:
    """Two forward and three backward, whatever the parts and the length."""
    for parts in ALL.values():
        with recording("sm_90") as recorded:
            inputs = [None if x is None else x.to("meta") for x in draw(parts, 200)]
            o, last, *kept = dplr_triton.forward_kernels(*inputs)
            assert len(recorded.launches) == 2
            dplr_triton.backward_kernels(*inputs[:6], *kept, o, o, last)
            assert len(recorded.launches) == 5


def test_bad_input() -> None:
    q, k, v, g, h, removal, state = draw(ALL["everything"], 20, heads=2)
    assert not any(x is None for x in (q, k, v, removal, state))
    for given, message in [
        ((q[0], k, v, g, removal), r"q has shape \[20, 2, 16\]; it must be \[batch, time, heads, dim\]"),
        ((q.half(), k, v, g, removal), "q is torch.float16 and v is torch.float32; they must have one dtype"),
        ((q, k, v, g, removal.double()), r"removal is torch\.float64 and q is torch\.float32"),
        ((q[:, :0], k[:, :0], v[:, :0], None, removal[:, :0]), "length of 0"),
        ((q, k[:, :5], v, g, removal), "k has shape"),
        ((q, k, v[:, :, :1], g, removal), "v has shape"),
        ((q, k, v, g[..., :5], removal), "decay has shape"),
        ((q, k, v, 3 * g, removal), r"decay must lie in \[-5, 0\]"),
        ((q, k, v, g, removal[..., :1, :]), "removal has shape"),
        (
            (q, k, v, g, removal, state[:, :1]),
            r"state has shape \[1, 1, 16, 16\]; it must be \[1, 2, 16, 16\]",
        ),
        ((q, k, v, g, removal, state.to("meta")), "state is on meta and q on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            dplr_triton.dplr_triton(*given)
    with pytest.raises(ValueError, match=r"q is torch\.float64; backend='triton' takes float32"):
        dplr_triton.twofold_linear_triton(q.double(), k.double(), v.double(), g.double(), h.double())
    with pytest.raises(ValueError, match="value_decay has shape"):
        dplr_triton.twofold_linear_triton(q, k, v, g, h[..., :5])
    with pytest.raises(ValueError, match=r"state has shape \[1, 2, 16, 15\]"):
        dplr_triton.twofold_linear_triton(q, k, v, g, h, state[..., :15])
    wide = torch.zeros(1, 2, 1, 200)
    with pytest.raises(ValueError, match="q has 200 key channels; backend='triton' takes at most 128"):
        dplr_triton.twofold_linear_triton(wide, wide, wide, wide, wide)
