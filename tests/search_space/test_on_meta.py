import subprocess
import sys

import pytest
import torch
from torch import nn

from mixforge.search_space.on_meta import on_meta
from mixforge.search_space.presets import PRESETS, preset

PROGRAM = """
import sys
from mixforge.search_space.presets import PRESETS, preset
for name in PRESETS:
    preset(name, "tiny").build(device="meta")
    loaded = {"torch._dynamo", "sympy"} & set(sys.modules)
    if loaded:
        sys.exit(f"{name} loads {loaded}")
"""


def shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}


@pytest.mark.parametrize("name", PRESETS)
def test_has_the_shapes_of_other_devices(name: str) -> None:
    architecture = preset(name, "tiny")
    assert shapes(architecture.build(device="meta")) == shapes(architecture.build())


def test_no_compiler_is_loaded_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_dtypes_are_those_of_the_same_work_elsewhere() -> None:
    def work() -> list[torch.Tensor]:
        whole, half = torch.arange(3), torch.ones(2, 1, dtype=torch.float16)
        repeated = half.repeat(2, 3)
        return [
            whole / 2,
            whole * 2,
            whole + half,
            1 - half.double(),
            half.log(),
            repeated,
            -repeated,
            whole**0.5,
        ]

    with on_meta():
        found = work()
    assert all(each.is_meta for each in found)
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in work()]
