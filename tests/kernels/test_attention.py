"""Softmax attention: its forms against one another in float64, and what FlexAttention is given."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from tolerance import FLOAT32, assert_as_good, assert_close, results
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from mixforge.kernels.attention import (
    FORMS,
    MASKED_FORMS,
    PREFIX_FORMS,
    WINDOW_FORMS,
    attended_pairs,
    form,
    masked_form,
    prefix_form,
    step_attention,
    window_form,
)

Made = Callable[..., Tensor]


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the triton form, with FlexAttention traced as on a GPU and run as plain torch."""
    module = importlib.import_module("mixforge.kernels.attention_triton")
    torch._dynamo.reset()
    for name, function in (("compiled", module.flex_attention), ("compiled_biased", module.biased)):
        monkeypatch.setattr(module, name, torch.compile(function, fullgraph=True, backend="eager"))
    # What it says of a CPU is true of its kernels only.
    whole = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(whole, "_validate_device", lambda *given: None)
    return module


def draw(length: int, past: int = 0, heads: int = 4, key_heads: int = 2, dim: int = 6) -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    sizes = [(heads, length), (key_heads, past + length), (key_heads, past + length)]
    return [torch.randn(3, *size, dim, generator=dice, dtype=torch.float64) for size in sizes]


def assert_equal(actual: Made, expected: Made, inputs: list[Tensor]) -> None:
    wanted = results(expected, inputs)
    for name, value in results(actual, inputs).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("length", [1, 13, 64])
def test_forms_agree_over_all_earlier_tokens(length: int, past: int, key_heads: int) -> None:
    forms = [partial(FORMS[name], start=past) for name in ("torch", "reference")]
    assert_equal(*forms, draw(length, past, key_heads=key_heads))


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (7, 9), (9, 9), (20, 9), (36, 9), (41, 9), (13, 1)])
def test_forms_agree_over_a_window(length: int, window: int, key_heads: int) -> None:
    """Shorter than the window, masked, in whole blocks and with a block that is not full."""
    forms = [partial(WINDOW_FORMS[name], window=window, past=0) for name in ("torch", "reference")]
    assert_equal(*forms, draw(length, key_heads=key_heads))


@pytest.mark.parametrize(("key_heads", "value_dim"), [(4, 6), (2, 3), (1, 9)])
@pytest.mark.parametrize(("length", "prefix"), [(1, 5), (13, 5), (13, 13), (13, 40), (13, 12), (40, 2)])
def test_forms_agree_over_a_prefix(length: int, prefix: int, key_heads: int, value_dim: int) -> None:
    q, k, v = draw(length, key_heads=key_heads)
    v = torch.cat([v, v], 3)[..., :value_dim]
    assert_equal(*(partial(PREFIX_FORMS[name], prefix=prefix) for name in ("torch", "reference")), [q, k, v])


@pytest.mark.parametrize("past", [1, 8])
@pytest.mark.parametrize("length", [1, 5, 50])
def test_forms_agree_behind_a_past(length: int, past: int) -> None:
    forms = [partial(WINDOW_FORMS[name], window=9, past=past) for name in ("torch", "reference")]
    assert_equal(*forms, draw(length, past))


def test_the_reference_is_the_equation() -> None:
    q, k, v = draw(11, key_heads=4)
    o = WINDOW_FORMS["reference"](q, k, v, 4, 0)
    weights = torch.exp(torch.stack([q[1, 2, 9] @ k[1, 2, s] for s in range(6, 10)]) / 6**0.5)
    torch.testing.assert_close(o[1, 2, 9], weights @ v[1, 2, 6:10] / weights.sum())
    o = PREFIX_FORMS["reference"](q, k, v, 5)
    for t, seen in ((0, 5), (3, 5), (4, 5), (5, 6), (10, 11)):
        weights = torch.exp(torch.stack([q[1, 2, t] @ k[1, 2, s] for s in range(seen)]) / 6**0.5)
        torch.testing.assert_close(o[1, 2, t], weights @ v[1, 2, :seen] / weights.sum())


def test_a_past_is_what_came_before() -> None:
    q, k, v = draw(30)
    for name in FORMS:
        whole = FORMS[name](q, k, v, 0)
        torch.testing.assert_close(FORMS[name](q[:, :, 12:], k, v, 12), whole[:, :, 12:])
        windowed = WINDOW_FORMS[name](q, k, v, 8, 0)
        piece = WINDOW_FORMS[name](q[:, :, 12:], k[:, :, 5:], v[:, :, 5:], 8, 7)
        torch.testing.assert_close(piece, windowed[:, :, 12:])


def test_a_step_is_the_last_row() -> None:
    q, k, v = draw(12)
    expected = FORMS["reference"](q, k, v, 0)[:, :, -1:]
    room = [torch.cat([x, torch.full_like(x[:, :, :3], 9.0)], 2) for x in (k, v)]
    torch.testing.assert_close(step_attention(q[:, :, -1:], *room, torch.tensor([11])), expected)
    torch.testing.assert_close(step_attention(q[:, :, -1:], k, v, torch.tensor([40])), expected)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_bfloat16_in_and_out(name: str) -> None:
    inputs = [x.bfloat16() for x in draw(40)]
    assert FORMS[name](*inputs, 0).dtype == torch.bfloat16
    assert WINDOW_FORMS[name](*inputs, 9, 0).dtype == torch.bfloat16
    assert PREFIX_FORMS[name](*inputs, 9).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_shapes_that_do_not_fit(name: str) -> None:
    q, k, v = draw(8, key_heads=2)
    with pytest.raises(ValueError, match=r"q must be of shape .* at least one token"):
        FORMS[name](q[:, :, :0], k, v, 0)
    with pytest.raises(ValueError, match=r"k must be of shape .* behind 2 earlier tokens"):
        FORMS[name](q, k, v, 2)
    with pytest.raises(ValueError, match="v must be of shape"):
        WINDOW_FORMS[name](q, k, v[:, :, :3], 4, 0)
    with pytest.raises(ValueError, match="2 key heads of k do not divide 3 query heads of q"):
        FORMS[name](q[:, :3], k, v, 0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        WINDOW_FORMS[name](q, k, v, 0, 0)


@pytest.mark.parametrize("window", [1, 9, 16, 33, 40, None])
def test_attended_pairs_are_those_that_are_computed(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pair that the fused operation is given, counted where it is called."""
    module = importlib.import_module("mixforge.kernels.attention")
    plain, pairs = module.attend, []

    def counted(q: Tensor, k: Tensor, v: Tensor, *rest: object, **named: object) -> Tensor:
        pairs.append(q.shape[0] // 3 * q.shape[2] * k.shape[2])
        return plain(q, k, v, *rest, **named)

    monkeypatch.setattr(module, "attend", counted)
    for length in (1, 36, 41, 160):
        pairs.clear()
        inputs = draw(length)
        if window is None:
            FORMS["torch"](*inputs, 0)
        else:
            WINDOW_FORMS["torch"](*inputs, window, 0)
        assert sum(pairs) == attended_pairs(length, window)
        pairs.clear()
        PREFIX_FORMS["torch"](*inputs, window or 7)
        assert sum(pairs) == attended_pairs(length, None, window or 7)


def test_triton_refuses_a_cpu(flex: ModuleType) -> None:
    inputs = [x.float() for x in draw(8)]
    with pytest.raises(ValueError, match=r"q is on cpu.*backend='triton'.*backend='torch'"):
        form("triton")(*inputs, 0)
    with pytest.raises(ValueError, match=r"q is on cpu.*backend='triton'.*backend='torch'"):
        window_form("triton")(*inputs, 4, 0)
    with pytest.raises(ValueError, match=r"q is on cpu.*backend='triton'.*backend='torch'"):
        prefix_form("triton")(*inputs, 4)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_flex_mask_is_the_window(flex: ModuleType, window: int) -> None:
    module = importlib.import_module("mixforge.kernels.attention")
    index = torch.arange(30)
    none = torch.zeros((), dtype=torch.int64)
    mask = flex.window_mask(window, torch.device("cpu"))
    seen = mask(none, none, index[:, None], index)
    assert torch.equal(seen, module.window_pairs(30, window, 0, torch.device("cpu")))


@pytest.mark.parametrize("window", [1, 5, 127, 128, 129, 300, 2000])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 700])
def test_flex_blocks_are_those_of_the_mask(flex: ModuleType, length: int, window: int) -> None:
    """Found by their bounds, they are what torch finds from all pairs."""
    attention = importlib.import_module("torch.nn.attention.flex_attention")
    device = torch.device("cpu")
    found = flex.block_mask(length, window, device)
    mask = flex.window_mask(window, device)
    expected = attention.create_block_mask(mask, None, None, length, length, device=device)
    assert found.shape == expected.shape
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    for side, part in (("kv", ""), ("q", ""), ("kv", "full_"), ("q", "full_")):
        for name in (f"{part}{side}_num_blocks", f"{part}{side}_indices"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize(
    ("length", "window", "past", "key_heads", "dim"),
    [(150, 9, 0, 4, 16), (150, 200, 0, 2, 16), (64, 9, 8, 1, 24), (1, 9, 8, 4, 5)],
)
def test_flex_equals_the_reference(
    flex: ModuleType, length: int, window: int, past: int, key_heads: int, dim: int
) -> None:
    inputs = draw(length, past, key_heads=key_heads, dim=dim)
    expected = WINDOW_FORMS["reference"](*inputs, window, past)
    torch.testing.assert_close(flex.flexible_attention(*inputs, window, past), expected)


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 32), (24, 16), (6, 12), (12, 6)])
def test_flex_takes_values_of_another_width_than_keys(flex: ModuleType, dim: int, value_dim: int) -> None:
    q, k, _ = draw(40, past=3, dim=dim)
    *_, v = draw(40, past=3, dim=value_dim)
    expected = WINDOW_FORMS["reference"](q, k, v, 9, 3)
    torch.testing.assert_close(flex.flexible_attention(q, k, v, 9, 3), expected)


def biased_inputs(length: int, key_heads: int, dim: int) -> list[Tensor]:
    """q, k and v, running sums of a gate's logarithms, slopes and the logits of sinks."""
    dice = torch.Generator().manual_seed(1)
    left = -torch.rand(3, 4, length, generator=dice, dtype=torch.float64).cumsum(2)
    each = [torch.randn(4, generator=dice, dtype=torch.float64) for _ in range(2)]
    return [*draw(length, key_heads=key_heads, dim=dim), left, *each]


def biased_reference(
    window: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    slope: Tensor | None,
    sink: Tensor | None,
) -> Tensor:
    length, heads = q.shape[2], q.shape[1]
    away = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    mask = torch.zeros(len(q), heads, length, length, device=q.device, dtype=q.dtype)
    if left is not None:
        mask = mask + left[..., None] - left[..., None, :]
    if slope is not None:
        mask = mask + slope[:, None, None] * away
    mask = mask.masked_fill((away < 0) | (away >= window), -torch.inf)
    if sink is not None:
        mask = torch.cat([mask, sink[:, None, None].expand(len(q), -1, length, 1)], 3)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    return masked_form("reference")(q, k, v, mask, 0.3)


@pytest.mark.parametrize(("window", "key_heads", "dim"), [(150, 4, 6), (150, 1, 16), (40, 2, 20)])
@pytest.mark.parametrize("given", [(3,), (4,), (5,), (3, 4, 5)])
def test_flex_takes_gates_slopes_and_sinks(
    flex: ModuleType, window: int, key_heads: int, dim: int, given: tuple[int, ...]
) -> None:
    inputs = biased_inputs(150, key_heads, dim)
    kept = [x if n < 3 or n in given else None for n, x in enumerate(inputs)]

    def run(*x: Tensor) -> Tensor:
        found: Tensor = flex.biased_attention(*x[:3], window, *x[3:], 0.3)
        return found

    actual, wanted = results(run, kept), results(partial(biased_reference, window), kept)
    for name, value in actual.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-8, atol=1e-10, msg=name)


def test_flex_has_a_kernel_for_the_gradient_of_a_gate(
    flex: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch's compiler for GPUs asks of the gradient of a score, which a plain run does not: one read a tensor."""
    inner = importlib.import_module("torch._inductor.kernel.flex.flex_attention")
    found = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if "flex_attention_backward" in str(node.target):
                names = [
                    each.target
                    for each in node.args
                    if isinstance(each, torch.fx.Node) and each.op == "get_attr"
                ]
                found.extend(getattr(graph, name) for name in names if "joint" in name)
        return make_boxed_func(graph.forward)

    traced = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    monkeypatch.setattr(flex, "compiled_biased", torch.compile(flex.biased, fullgraph=True, backend=traced))
    inputs = [x.float().requires_grad_() for x in biased_inputs(20, 4, 16)]
    o = flex.biased_attention(*inputs[:3], 20, inputs[3], inputs[4].detach(), inputs[5], 0.3)
    # What is traced is for a compiler: by itself it does not run.
    with contextlib.suppress(RuntimeError):
        o.sum().backward()
    assert len(found) == 1
    inner.validate_joint_graph(found[0].graph)


def test_windows_and_lengths_compile_nothing_anew(flex: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a first length, and once for every other."""
    count = importlib.import_module("torch._dynamo.testing").CompileCounter()
    monkeypatch.setattr(flex, "compiled", torch.compile(flex.flex_attention, fullgraph=True, backend=count))
    for length, window in [(150, 5), (300, 5), (400, 7), (500, 9), (350, 11), (270, 13)]:
        flex.flexible_attention(*draw(length, dim=16), window)
    assert count.frame_count == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [300, 64])
def test_gates_slopes_and_sinks_on_a_gpu(window: int, dtype: torch.dtype) -> None:
    module = importlib.import_module("mixforge.kernels.attention_triton")
    q, k, v, left, slope, sink = (x.cuda().float() for x in biased_inputs(300, 2, 32))
    inputs = [*(x.to(dtype) for x in (q, k, v)), left, sink]

    def run(q: Tensor, k: Tensor, v: Tensor, left: Tensor, sink: Tensor) -> Tensor:
        found: Tensor = module.biased_attention_triton(q, k, v, window, left, slope, sink, 0.3)
        return found

    def plain(q: Tensor, k: Tensor, v: Tensor, left: Tensor, sink: Tensor) -> Tensor:
        return biased_reference(window, q, k, v, left, slope.to(left.dtype), sink)

    wanted = results(plain, [x.double() for x in inputs])
    for name, value in results(run, inputs).items():
        assert_close(name, value, wanted[name], max(FLOAT32, 4 * torch.finfo(dtype).eps))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [8, 32, 48, 128])
@pytest.mark.parametrize(
    ("length", "window", "past"), [(1, 9, 0), (200, 64, 0), (1000, 130, 0), (300, 64, 63)]
)
def test_a_gpu_is_as_exact_as_the_torch_form(
    length: int, window: int, past: int, dim: int, dtype: torch.dtype
) -> None:
    inputs = [x.to("cuda", dtype) for x in draw(length, past, dim=dim)]
    windows = [
        partial(window_form(name), window=window, past=past) for name in ("triton", "torch", "reference")
    ]
    assert_as_good(*windows, inputs)
    assert_as_good(*(partial(form(name), start=past) for name in ("triton", "torch", "reference")), inputs)
    if past == 0:
        prefixes = [partial(prefix_form(name), prefix=window) for name in ("triton", "torch", "reference")]
        assert_as_good(*prefixes, inputs)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("key_heads", [4, 1])
def test_forms_agree_over_given_pairs(key_heads: int, added: bool) -> None:
    """Pairs that are seen, or terms that are added; values that are wider than keys."""
    q_BHTK, k_BHTK, _ = draw(9, 4, key_heads=key_heads)
    v_BHTV = torch.randn(
        3, key_heads, 13, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    seen = torch.arange(13) <= torch.arange(4, 13)[:, None]
    inputs = [q_BHTK, k_BHTK, v_BHTV]
    if not added:
        assert_equal(
            *(partial(MASKED_FORMS[name], mask=seen, scale=0.3) for name in ("torch", "reference")), inputs
        )
        return
    term = torch.randn(3, 4, 9, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def run(name: str, q: Tensor, k: Tensor, v: Tensor, term: Tensor) -> Tensor:
        return MASKED_FORMS[name](q, k, v, term.masked_fill(~seen, -torch.inf), 0.3)

    assert_equal(partial(run, "torch"), partial(run, "reference"), [*inputs, term])


@pytest.mark.parametrize("width", [5, 17])
def test_values_wider_or_narrower_than_keys(width: int) -> None:
    q, k, v = draw(23)
    wide = torch.cat([v, v + 1, -v], 3)[..., :width]
    assert_equal(partial(FORMS["torch"], start=0), partial(FORMS["reference"], start=0), [q, k, wide])
