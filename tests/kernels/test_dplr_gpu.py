"""The kernels of dplr and of decays on both sides on a GPU, at twice the error of torch against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good
from torch import Tensor

from mixforge.kernels import dplr, twofold_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("triton", "torch", "reference")


def draw(kind: str, length: int, dim: int, dtype: torch.dtype) -> list[Tensor | None]:
    dice = torch.Generator().manual_seed(0)
    q, k, v, a = (torch.randn(2, length, 3, dim, generator=dice) for _ in range(4))
    g, h, rate = (torch.rand(2, length, 3, dim, generator=dice) for _ in range(3))
    a = F.normalize(a + 0.5, dim=-1)
    beside = {
        "removal and decay": [-2 * g, torch.stack([a, a * rate], -2)],
        "removal": [None, torch.stack([a, a * rate], -2)],
        "both decays": [-2 * g, -5 * h],
    }
    keys = [x.to(dtype) for x in (q * dim**-0.5, F.normalize(k, dim=-1), v)]
    given = [*keys, *beside[kind], torch.randn(2, 3, dim, dim, generator=dice)]
    return [None if x is None else x.cuda() for x in given]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["removal and decay", "removal", "both decays"])
@pytest.mark.parametrize(("length", "dim"), [(1, 64), (65, 16), (200, 128), (1000, 100)])
def test_as_good_as_torch(kind: str, length: int, dim: int, dtype: torch.dtype) -> None:
    module = twofold_linear if kind == "both decays" else dplr
    # Powers are beyond float16, so that products of them are of TF32, to which a device cuts instead of rounding.
    least = 2.0**-10 if dtype == torch.float16 else None
    assert_as_good(*map(module.form, BACKENDS), draw(kind, length, dim, dtype), least)
