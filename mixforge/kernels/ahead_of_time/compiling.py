"""Compiling a written-down launch for a device that is not there, and reading what came out.

The types, constants and hints are derived by the JIT's own functions, so that what is compiled is what a launch on the
device would compile.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from mixforge.kernels.ahead_of_time.budgets import Figures
from mixforge.kernels.ahead_of_time.reading import read_gcn, read_hazards, read_sass, sass
from mixforge.kernels.launch import Launch

TARGETS: dict[str, Any] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_TILE_OPERATION = re.compile(
    r"\btt\.(?:load|store|dot|reduce|scan|atomic_rmw|descriptor_load|descriptor_store)\b"
)
# Operands of 16 bits, or float32 that may be cut to TF32.
_MATRIX_DOT = re.compile(r"\btt\.dot\b.*(?:x(?:bf16|f16)> \*|inputPrecision = tf32)")


@dataclass(frozen=True, slots=True)
class Unit:
    """One compilation, in values that can be sent to another process."""

    module: str
    kernel: str
    target: str
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The same for two launches that the JIT would serve with one compilation."""
        return repr(
            (
                self.module,
                self.kernel,
                self.target,
                self.signature,
                self.constants,
                self.attributes,
                self.options,
            )
        )


def unit(launch: Launch, target: str) -> Unit:
    """What the JIT would compile for a launch on a target."""
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    words = {
        **launch.constants,
        **launch.config.options,
        "debug": bool(kernel.debug),
        "instrumentation_mode": "",
    }
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, unbound = bind(*launch.args, **words)
    options, signature, constants, attributes = kernel._pack_args(
        backend, words, bound, specialization, unbound
    )
    return Unit(
        kernel.fn.__module__,
        launch.name,
        target,
        signature,
        constants,
        attributes,
        # What the backend adds of its own is found again from the target.
        {name: vars(options)[name] for name in (*launch.config.options, "debug")},
    )


def compile_units(wanted: Sequence[Unit]) -> list[Figures]:
    """Compile for one target without a cache, and read the figures."""
    target = TARGETS[wanted[0].target]
    made = [_compiled(one, target) for one in wanted]
    if target.backend == "hip":
        read = [read_gcn(compiled.asm["amdgcn"]) for compiled, _ in made]
    else:
        read = read_sass([compiled.asm["cubin"] for compiled, _ in made], target.arch)
    return [_figures(*one, found) for one, found in zip(made, read, strict=True)]


def compile_sass(wanted: Unit) -> tuple[Figures, str]:
    """The figures of one kernel for an NVIDIA device, and its code."""
    target = TARGETS[wanted.target]
    compiled, taken_s = _compiled(wanted, target)
    cubin = compiled.asm["cubin"]
    return _figures(compiled, taken_s, read_sass([cubin], target.arch)[0]), sass(cubin)


def hazards(wanted: Unit) -> tuple[str, ...]:
    """What of a kernel gives wrong numbers on a device. It is kept where the JIT looks for it."""
    compiled = triton.compile(_source(wanted), target=TARGETS[wanted.target], options=dict(wanted.options))
    return read_hazards(compiled.asm["ttgir"])


def _source(wanted: Unit) -> ASTSource:
    kernel = getattr(import_module(wanted.module), wanted.kernel)
    return ASTSource(kernel, wanted.signature, wanted.constants, wanted.attributes)


def _compiled(wanted: Unit, target: Any) -> tuple[Any, float]:
    """What Triton made of it, and the seconds that it took."""
    source = _source(wanted)
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        triton.knobs.compilation.scope(),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        start = time.perf_counter()
        with _first_error():
            compiled = triton.compile(source, target=target, options=dict(wanted.options))
        return compiled, time.perf_counter() - start


def _figures(compiled: Any, seconds: float, read: Mapping[str, int]) -> Figures:
    middle = compiled.asm["ttir"]
    return Figures(
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0),
        least_instructions=len(_TILE_OPERATION.findall(middle)),
        wants_matrix=_MATRIX_DOT.search(middle) is not None,
        hazards=read_hazards(compiled.asm["ttgir"]),
        compile_s=seconds,
        **read,
    )


@contextmanager
def _first_error() -> Generator[None]:
    """Put the first error that the compiler writes into its exception, and drop the program that it prints with it."""
    with tempfile.TemporaryFile("w+") as written:
        before = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        except RuntimeError as error:
            written.seek(0)
            first = next((line.strip() for line in written if "error:" in line), "no reason given")
            raise RuntimeError(f"{error}: {first}") from error
        finally:
            os.dup2(before, 2)
            os.close(before)
