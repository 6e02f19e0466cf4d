"""Cross-entropy in chunks is the cross-entropy of the logits, with its gradients, and holds less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.evaluator.memory import peak_bytes
from mixforge.kernels import cross_entropy
from mixforge.kernels.cross_entropy import CHUNK_ROWS, HAS_CHUNKS, LEAST_VOCAB, linear_cross_entropy

WIDTH = 8


def draw(rows: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=dice, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, WIDTH, generator=dice, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (rows,), generator=dice)


@pytest.mark.parametrize(
    "has_chunks", [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_CHUNKS, reason="torch < 2.13"))]
)
@pytest.mark.parametrize(
    ("rows", "vocab"), [(5, 11), (CHUNK_ROWS, LEAST_VOCAB), (CHUNK_ROWS + 3, LEAST_VOCAB), (2500, 2049)]
)
def test_loss_and_gradients(rows: int, vocab: int, has_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "HAS_CHUNKS", has_chunks)
    x, weight, targets = draw(rows, vocab)
    logits = x @ weight.T
    expected = (torch.logsumexp(logits, 1) - logits[torch.arange(rows), targets]).mean()
    loss = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    # The chunks hold gradients ready for a loss of weight 1, so that another weight is a test of its own.
    wanted = torch.autograd.grad(3 * expected, (x, weight))
    for actual, gradient in zip(torch.autograd.grad(3 * loss, (x, weight)), wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vocab", [11, LEAST_VOCAB])
def test_bfloat16_gives_a_loss_in_float32(vocab: int) -> None:
    x, weight, targets = draw(CHUNK_ROWS + 1, vocab, torch.bfloat16)
    loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(F.linear(x.double(), weight.double()), targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not HAS_CHUNKS, reason="torch < 2.13")
def test_the_logits_are_not_in_memory() -> None:
    rows, vocab = 4 * CHUNK_ROWS, LEAST_VOCAB
    x, weight, targets = draw(rows, vocab, torch.float32)
    peak = peak_bytes(lambda: linear_cross_entropy(x, weight, targets).backward(), "cpu")
    assert peak < rows * vocab * 4 / 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("vocab", [11, LEAST_VOCAB])
def test_compiles_as_one_graph(vocab: int) -> None:
    torch._dynamo.reset()
    x, weight, targets = draw(CHUNK_ROWS + 1, vocab)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected, loss = linear_cross_entropy(x, weight, targets), compiled(x, weight, targets)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, (x, weight))
    for actual, gradient in zip(torch.autograd.grad(loss, (x, weight)), wanted, strict=True):
        torch.testing.assert_close(actual, gradient)
