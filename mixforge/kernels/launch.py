"""Where a Triton kernel can run, and how it is launched.

Every launch of the package goes through `launch`. Inside `recording`, launches are written down instead of run:
the ahead-of-time gate compiles what was written down, and traffic and launches are counted from it, so that what is
checked on a machine without a GPU is what a machine with one would launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from mixforge.kernels.backend import BeyondKernels
from mixforge.kernels.blocks import Config, table_only
from mixforge.kernels.operands import check_one_device

# What CUDA takes in the second and the third dimension of a grid.
MOST_PROGRAMS = 65_535


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that was written down. `args` are tensors, numbers and None, in the kernel's order."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    """The kernel's constexpr arguments by name, blocks included."""
    config: Config

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def traffic_bytes(self) -> int:
        """Bytes of all tensors that it is given, each counted once: what it moves if it reads or writes all of each."""
        tensors = {id(arg): arg for arg in self.args if isinstance(arg, Tensor)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass(slots=True)
class Recording:
    """What is launched while it is on, for a device generation such as `sm_90` or `gfx942`."""

    generation: str
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(generation: str) -> Generator[Recording]:
    """Write launches down instead of running them. Tensors may be on the meta device."""
    made = Recording(generation)
    token = _recording.set(made)
    try:
        with table_only():
            yield made
    finally:
        _recording.reset(token)


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter, as NumPy: TRITON_INTERPRET=1 before the first import."""
    return bool(triton.knobs.runtime.interpret)


def generation() -> str:
    """The generation that is launched for: `sm_90`, `gfx942`, or `cpu` under the interpreter."""
    recorded = _recording.get()
    if recorded is not None:
        return recorded.generation
    return (
        "cpu" if interpreting() or not torch.cuda.is_available() else _generation(torch.cuda.current_device())
    )


@functools.cache
def _generation(device: int) -> str:
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(found.gcnArchName).partition(":")[0]
    return f"sm_{found.major}{found.minor}"


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as three TF32 products where there are some, or as they are."""
    return "tf32x3" if dtype == torch.float32 and generation().startswith("sm_") else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any) -> None:
    """Run a kernel over a grid, with the blocks, warps and stages of `config`.

    Raises BeyondKernels, a ValueError, for a grid that CUDA does not take.
    """
    if max(grid[1:], default=0) > MOST_PROGRAMS and generation().startswith("sm_"):
        raise BeyondKernels(
            f"{kernel.fn.__name__} needs a grid of {list(grid)}; CUDA takes at most {MOST_PROGRAMS} in the second and "
            "third dimension: give a smaller batch or shorter sequences"
        )
    recorded = _recording.get()
    constants |= config.blocks
    if recorded is not None:
        recorded.launches.append(Launch(kernel, grid, args, constants, config))
    elif all(grid):
        kernel[grid](*args, **constants, **config.options)


def on_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with the device of its first tensor as the current one: Triton launches on that.

    It raises ValueError where Triton cannot run there.
    """

    @functools.wraps(run)
    def guarded(*args: Any, **others: Any) -> Any:
        first = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if first is None or not first.is_cuda or _recording.get() is not None:
            if first is not None:
                check_runs("an operand", first)
            return run(*args, **others)
        with torch.cuda.device(first.device):
            return run(*args, **others)

    return guarded


def check_device(**tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor is not where Triton can run, or not where the first one is."""
    check_one_device(**tensors)
    check_runs(*next((name, tensor) for name, tensor in tensors.items() if tensor is not None))


def check_runs(name: str, tensor: Tensor) -> None:
    """Raise ValueError where a tensor is not where Triton can run."""
    kind = tensor.device.type
    # Where torch.compile traces, `on_device` asks later: what is written down is no part of a graph.
    if kind == "cuda" or torch.compiler.is_compiling() or _recording.get() is not None:
        return
    if kind == "cpu" and interpreting():
        return
    raise ValueError(
        f"{name} is on {kind}, and backend='triton' runs on a GPU: move model and inputs with .to('cuda'), "
        "or build with backend='torch'"
    )


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor is of no dtype that the kernels take."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} is {tensor.dtype}; backend='triton' takes float32, bfloat16 and float16"
            )


def check_state(state: Tensor, shape: Sequence[int] | None = None) -> None:
    """Raise ValueError where a state cannot be updated in place, or has another shape than the one given."""
    fits = shape is None or tuple(state.shape) == tuple(shape)
    if fits and state.dtype == torch.float32 and state.is_contiguous():
        return
    wanted = "float32 and contiguous" + ("" if shape is None else f", of shape {list(shape)}")
    raise ValueError(
        f"state is {state.dtype} of shape {list(state.shape)} with strides {list(state.stride())}; it must be {wanted}"
    )
