"""A state for each level of a Fenwick tree: chunks against the loop and the dense matrix, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixforge.kernels.log_linear import (
    form,
    log_linear_reference,
    log_linear_torch,
    matmul_flops,
)

KEYS, VALUES, LEVELS = 5, 7, 6


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, length, 2, KEYS, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, length, 4, VALUES, generator=generator, dtype=torch.float64)
    decay = -0.1 * torch.rand(2, length, 4, generator=generator, dtype=torch.float64)
    beta = 2 * torch.rand(2, length, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(2, length, 4, LEVELS, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q, F.normalize(k, dim=-1), v, decay, beta, weight)]


@torch.no_grad()
@pytest.mark.parametrize("is_delta", [False, True])
def test_it_is_the_papers_matrix(is_delta: bool) -> None:
    """The matrix of a plain linear recurrence, each entry times the weight of its level; the last level goes on."""
    length = 100
    q, k, v, decay, beta, weight = inputs(length)
    o, _ = log_linear_torch(q, k, v, decay, beta if is_delta else None, None, weight)
    for h in (3,):
        rows = torch.zeros(length, VALUES, dtype=torch.float64)
        keys, of = k[0, :, h // 2], decay[0, :, h].exp()
        moves = []
        for t in range(length):
            erased = beta[0, t, h] * torch.outer(keys[t], keys[t]) if is_delta else torch.zeros(KEYS, KEYS)
            moves.append(of[t] * (torch.eye(KEYS, dtype=torch.float64) - erased))
        left: list[Tensor] = []
        for t in range(length):
            write = beta[0, t, h] * keys[t] if is_delta else keys[t]
            left = [moves[t] @ each for each in left] + [write]
            for j, each in enumerate(left):
                level = min((t ^ j).bit_length(), LEVELS - 1)
                rows[t] += weight[0, t, h, level] * (q[0, t, h // 2] @ each) * v[0, j, h]
        torch.testing.assert_close(o[0, :, h], rows)


@pytest.mark.parametrize("length", [1, 13, 100])
@pytest.mark.parametrize("is_delta", [False, True])
def test_chunks_equal_the_loop_and_so_do_their_gradients(length: int, is_delta: bool) -> None:
    q, k, v, decay, beta, weight = inputs(length)
    given = [q, k, v, decay, weight, *([beta] if is_delta else [])]
    factor = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (log_linear_reference, log_linear_torch):
        o, none = run(q, k, v, decay, beta if is_delta else None, None, weight)
        assert none is None
        found.append([o, *torch.autograd.grad((o * factor).sum(), given)])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


# Within a chunk, to its end, from its beginning, over several, and over one whole one.
PIECES = (5, 9, 18, 3, 61, 1, 53, 10, 32, 8)


@torch.no_grad()
@pytest.mark.parametrize("is_delta", [False, True])
def test_pieces_equal_one_pass_and_their_states_the_loops(is_delta: bool) -> None:
    q, k, v, decay, beta, weight = inputs(sum(PIECES))
    expected, _ = log_linear_torch(q, k, v, decay, beta if is_delta else None, None, weight)
    states = [torch.zeros(2, 4, 8, KEYS, VALUES, dtype=torch.float64) for _ in range(2)]
    outputs, done = [], 0
    for piece in PIECES:
        *part, strength, of_levels = (x[:, done : done + piece] for x in (q, k, v, decay, beta, weight))
        part.append(strength if is_delta else None)
        o, states[0] = log_linear_torch(*part, states[0], of_levels, done)
        _, states[1] = log_linear_reference(*part, states[1], of_levels, done)
        torch.testing.assert_close(states[0], states[1])
        outputs.append(o)
        done += piece
    torch.testing.assert_close(torch.cat(outputs, 1), expected)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["add", "delta"])
def test_flops_are_exact(rule: str) -> None:
    for length in (1, 150):
        q, k, v, decay, beta, weight = inputs(length, torch.float32)
        with FlopCounterMode(display=False) as counter:
            log_linear_torch(q, k, v, decay, beta if rule == "delta" else None, None, weight)
        sizes = {"heads": 4, "key_dim": KEYS, "value_dim": VALUES, "rule": rule}
        assert counter.get_total_flops() == 2 * matmul_flops(length, **sizes)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_bad_input(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    run = form(backend)
    q, k, v, decay, beta, weight = (x.detach() for x in inputs(20, torch.float32))
    for given, message in [
        ((q, k[:, :5], v, decay, beta, None, weight), r"k has shape \[2, 5, 2, 5\]; it must be \["),
        ((q[:, :0], k[:, :0], v[:, :0], None, None, None, weight[:, :0]), "q has a length of 0"),
        (
            (q, k, v, decay[..., None].expand(-1, -1, -1, KEYS), beta, None, weight),
            r"it must be one of \[4\], \[2, 20, 4\]",
        ),
        ((q, k, v, decay, beta, None, weight[:, :5]), r"weight has shape \[2, 5, 4, 6\]"),
        ((q, k, v, decay, beta, torch.zeros(2, 4, KEYS, VALUES), weight), r"it must be \[2, 4, bits, 5, 7\]"),
        (
            (q, k, v, decay, beta, torch.zeros(2, 3, 6, KEYS, VALUES), weight),
            r"it must be \[2, 4, bits, 5, 7\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*given)


def test_short_sequences_need_a_gpu_too() -> None:
    pytest.importorskip("triton")
    q, k, v, decay, beta, weight = (x.detach() for x in inputs(8, torch.float32))
    with pytest.raises(ValueError, match="q is on cpu, and backend='triton' runs on a GPU"):
        form("triton")(q, k, v, decay, beta, None, weight)
    with pytest.raises(ValueError, match="weight is on meta and q on cpu; put both on one device"):
        form("triton")(q, k, v, decay, beta, None, weight.to("meta"))
