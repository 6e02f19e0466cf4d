"""The linear family's kernels on a GPU, against the recurrence in float64, at twice the error of torch's form."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

from mixforge.kernels.chunked_linear import chunked_linear_reference, chunked_linear_torch
from mixforge.search_space.notation import parse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DECAYS = ("none", "head", "scalar", "channel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(
    decay: str,
    rule: str,
    length: int,
    dim: int,
    dtype: torch.dtype,
    values: int | None = None,
    batch: int = 2,
) -> list[Tensor | None]:
    values = values or dim
    dice = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, length, 2, dim, generator=dice) for _ in range(2))
    v = torch.randn(batch, length, 4, values, generator=dice)
    shapes = {"head": (4,), "scalar": v.shape[:3], "channel": (*v.shape[:3], dim)}
    g = None if decay == "none" else -torch.rand(shapes[decay], generator=dice).cuda()
    beta = 2 * torch.rand(v.shape[:3], generator=dice).cuda() if rule == "delta" else None
    state = torch.randn(batch, 4, dim, values, generator=dice).cuda()
    unit = torch.nn.functional.normalize
    q, k, v = (x.cuda().to(dtype) for x in (q * dim**-0.5, unit(k, dim=-1), v))
    return [q, k, v, g, beta, state]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", ["add", "delta"])
@pytest.mark.parametrize(
    ("length", "dim"), [(1, 64), (65, 16), (200, 32), (150, 48), (200, 128), (1000, 100), (130, 256)]
)
def test_as_good_as_torch(rule: str, decay: str, length: int, dim: int, dtype: torch.dtype) -> None:
    from mixforge.kernels.chunked_linear_triton import chunked_linear_triton

    inputs = draw(decay, rule, length, dim, dtype)
    forms = (chunked_linear_triton, chunked_linear_torch, chunked_linear_reference)
    # The gradient of a fixed decay sums over all tokens what nearly cancels, of products in three parts of TF32.
    least = 1e-5 if dtype == torch.float32 and decay == "head" else None
    assert_as_good(*forms, inputs, least)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", ["add", "delta"])
@pytest.mark.parametrize("values", [64, 128])
def test_as_good_as_torch_with_values_wider_than_keys(
    values: int, rule: str, decay: str, dtype: torch.dtype
) -> None:
    from mixforge.kernels.chunked_linear_triton import chunked_linear_triton

    forms = (chunked_linear_triton, chunked_linear_torch, chunked_linear_reference)
    least = 1e-5 if dtype == torch.float32 and decay == "head" else None
    assert_as_good(*forms, draw(decay, rule, 100, 32, dtype, values), least)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", ["add", "delta"])
@pytest.mark.parametrize(("length", "dim", "values"), [(130, 64, 64), (200, 128, 100), (65, 32, 128)])
def test_as_good_as_torch_where_heads_fill_the_device(
    length: int, dim: int, values: int, rule: str, decay: str, dtype: torch.dtype
) -> None:
    """The scan then makes the output, and without gradients keeps nothing."""
    from mixforge.kernels.chunked_linear_triton import ENOUGH, chunked_linear_triton

    inputs = draw(decay, rule, length, dim, dtype, values, batch=ENOUGH // 4)
    least = 1e-5 if dtype == torch.float32 and decay == "head" else None
    assert_as_good(chunked_linear_triton, chunked_linear_torch, chunked_linear_reference, inputs, least)
    kept = chunked_linear_triton(*(None if x is None else x.requires_grad_() for x in inputs))
    with torch.no_grad():
        for alone, beside in zip(chunked_linear_triton(*inputs), kept, strict=True):
            torch.testing.assert_close(alone, beside, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", ["add", "delta"])
@pytest.mark.parametrize("programs", [1, 1000])
def test_as_good_as_torch_over_packed_sequences(
    programs: int, rule: str, decay: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a state of its own before it; with the output made by the scan and by a kernel of its own."""
    from mixforge.kernels import chunked_linear_triton

    monkeypatch.setattr(chunked_linear_triton, "ENOUGH", programs)
    bounds = torch.tensor([0, 1, 15, 80, 145, 300], device="cuda")
    q, k, v, g, beta, _ = draw(decay, rule, 300, 64, dtype, batch=1)
    state = draw(decay, rule, 1, 64, dtype, batch=len(bounds) - 1)[5]
    forms = (chunked_linear_triton.chunked_linear_triton, chunked_linear_torch, chunked_linear_reference)
    # The gradient of a fixed decay sums over all sequences what nearly cancels.
    least = max(1e-5, torch.finfo(dtype).eps) if decay == "head" else None
    packed = [partial(form, cu_seqlens=bounds) for form in forms]
    assert_as_good(*packed, [q, k, v, g, beta, state], least)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_as_good_as_torch_over_keys_whose_state_no_kernel_holds(decay: str, dtype: torch.dtype) -> None:
    from mixforge.kernels.chunked_linear_triton import chunked_linear_triton

    forms = (chunked_linear_triton, chunked_linear_torch, chunked_linear_reference)
    assert_as_good(*forms, draw(decay, "delta", 300, 272, dtype))


@pytest.mark.parametrize(
    "preset",
    [
        "gdn",
        "kda",
        "mamba2",
        "rwkv7",
        "linear(decay=both)",
        "linear(rule=delta, phi=taylor(2), key_dim=16, heads=2)",
        "hla2",
        "linear(rule=slots(4), decay=channel)",
        "mamba2(levels=log, heads=2)",
        "gdn(levels=log, heads=2)",
        "ssm",
        "ssm(rule=s4d, gate=glu)",
        "hgrn",
        "rglru",
        "attn(query=learned, pos=none)",
        "attn(window=16)",
    ],
)
def test_steps_equal_the_forward_pass(preset: str) -> None:
    model = parse(f"lm(2 * ({preset} + swiglu), width=128)").build("triton", device="cuda")
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        expected = model(tokens)
        logits, state = model.prefill(tokens[:, :4], capacity=16)
        for position in range(4, 12):
            logits, state = model.step(tokens[:, position], state)
            torch.testing.assert_close(logits, expected[:, position], rtol=1e-3, atol=1e-3)
