import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixforge.kernels import dense as module
from mixforge.kernels.dense import dense


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's product for all sizes, on any processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("torch has no oneDNN here")
    product = module._onednn_product()
    assert product is not None, "torch has oneDNN, and no product by it: see kernels/dense.py"
    monkeypatch.setattr(module, "onednn_product", lambda: product)
    monkeypatch.setattr(module, "LEAST", 1)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    monkeypatch.setattr(module, "LEAST_DIM", 1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def onednn_runs(x: Tensor, weight_FD: Tensor) -> bool:
    with torch.autograd.profiler.profile() as profile:
        dense(x, weight_FD)
    return any(event.name == "mkldnn::_linear_pointwise" for event in profile.function_events)


LAYOUTS = {
    "plain": (draw(3, 20, 40), draw(24, 40)),
    "rows apart": (draw(3, 20, 50)[..., :40], draw(24, 40)),
    "weights apart": (draw(3, 20, 40), draw(24, 50)[:, :40]),
    "both by columns": (draw(40, 20).mT, draw(40, 24).mT),
    "one row for all": (draw(1, 40).expand(20, 40), draw(24, 40)),
    "one row": (draw(40), draw(24, 40)),
    "one output": (draw(20, 40), draw(1, 40)),
    "one input": (draw(20, 1), draw(24, 1)),
}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_linear_map_with_its_gradients(layout: str, has_bias: bool) -> None:
    x, weight_FD = (value.detach().requires_grad_() for value in LAYOUTS[layout])
    bias_F = draw(len(weight_FD)).requires_grad_() if has_bias else None
    inputs = (x, weight_FD) if bias_F is None else (x, weight_FD, bias_F)
    assert onednn_runs(x, weight_FD)
    dy = draw(*x.shape[:-1], 2 * len(weight_FD))[..., ::2]
    expected = F.linear(x, weight_FD, bias_F)
    torch.testing.assert_close(dense(x, weight_FD, bias_F), expected)
    with torch.no_grad():
        torch.testing.assert_close(dense(x, weight_FD, bias_F), expected)
    for ours, theirs in zip(
        torch.autograd.grad(dense(x, weight_FD, bias_F), inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_has_a_second_derivative() -> None:
    x, weight_FD = draw(20, 40).requires_grad_(), draw(24, 40).requires_grad_()

    def second(product: object) -> Tensor:
        assert callable(product)
        (dx,) = torch.autograd.grad(product(x, weight_FD).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), weight_FD)[0]

    torch.testing.assert_close(second(dense), second(F.linear))


def test_gradients_of_some_alone() -> None:
    x, weight_FD = draw(20, 40), draw(24, 40).requires_grad_()
    dense(x, weight_FD).sum().backward()
    assert weight_FD.grad is not None
    torch.testing.assert_close(weight_FD.grad, x.sum(0).expand(24, 40))
    frozen = dense(draw(20, 40).requires_grad_(), draw(24, 40))
    frozen.sum().backward()


def test_torch_counts_its_flops() -> None:
    x, weight_FD = draw(3, 20, 40).requires_grad_(), draw(24, 40).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        dense(x, weight_FD).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 60 * 40 * 24


def test_elsewhere_it_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight_FD = draw(20, 40), draw(24, 40)
    assert onednn_runs(x, weight_FD)
    assert not onednn_runs(x.double(), weight_FD.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert dense(x, weight_FD).dtype == torch.bfloat16
    assert dense(x.to("meta"), weight_FD.to("meta")).shape == (20, 24)
    monkeypatch.setattr(module, "LEAST_ROWS", 21)
    assert not onednn_runs(x, weight_FD)
    monkeypatch.setattr(module, "LEAST", 20 * 40 * 24 + 1)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    assert not onednn_runs(x, weight_FD)


def test_transforms_of_torch_func() -> None:
    x, weight_FD = draw(5, 20, 40), draw(24, 40)
    each = torch.func.vmap(torch.func.grad(lambda x, w: dense(x, w).square().sum()), (0, None))(x, weight_FD)
    torch.testing.assert_close(each, 2 * (x @ weight_FD.mT) @ weight_FD)


def test_compiled_it_is_the_compiler_s_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, whatever the processor and however large: two lengths, the second with a symbol for it."""
    monkeypatch.undo()
    torch._dynamo.reset()
    weight_FD = draw(256, 256).requires_grad_()
    compiled = torch.compile(dense, fullgraph=True, backend="aot_eager")
    for rows in (64, 100, 200):
        x = draw(rows, 256).requires_grad_()
        assert x.numel() * len(weight_FD) >= module.LEAST
        torch.testing.assert_close(compiled(x, weight_FD), F.linear(x, weight_FD))
    torch._dynamo.reset()
