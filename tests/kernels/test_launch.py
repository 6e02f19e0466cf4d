"""What is launched is what a GPU takes."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from mixforge.kernels import norm, short_conv
from mixforge.kernels.blocks import Config
from mixforge.kernels.launch import interpreting, launch, recording

KERNEL = SimpleNamespace(fn=lambda: None)


@pytest.mark.skipif(interpreting(), reason="the interpreter runs on a CPU")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_cpu_is_named_also_where_it_is_compiled(is_compiled: bool) -> None:
    run = norm.form("triton")
    run = torch.compile(run, fullgraph=True, backend="eager") if is_compiled else run
    with pytest.raises(ValueError, match="is on cpu, and backend='triton' runs on a GPU"):
        run(torch.ones(2, 5), torch.ones(5))


def test_a_kernel_loads_no_compiler() -> None:
    said = "import sys, mixforge.kernels.launch; print('torch._dynamo' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", said], text=True).split() == ["False"]


@pytest.mark.parametrize("grid", [(1, 65_536), (1, 1, 65_536)])
def test_a_grid_that_cuda_does_not_take(grid: tuple[int, ...]) -> None:
    with (
        recording("sm_90"),
        pytest.raises(ValueError, match=r"needs a grid of .* at most 65535 .* smaller batch"),
    ):
        launch(KERNEL, grid, config=Config({}))


def test_the_largest_grids() -> None:
    with recording("sm_90") as made:
        launch(KERNEL, (1 << 20, 65_535, 65_535), config=Config({}))
    with recording("gfx942"):
        launch(KERNEL, (1, 1, 65_536), config=Config({}))
    assert len(made.launches) == 1


def test_a_batch_of_more_sequences_than_that_is_named() -> None:
    x, weight = torch.empty(65_536, 1, 1, device="meta"), torch.empty(1, 2, device="meta")
    with recording("sm_90"), pytest.raises(ValueError, match="conv_forward needs a grid"):
        short_conv.form("triton")(x, weight)
