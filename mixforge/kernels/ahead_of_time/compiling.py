"""Compiling a written-down launch for a device that is not there, and reading what came out.

The types, constants and hints are derived by the JIT's own functions, so that what is compiled is what a launch on the
device would compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from mixforge.kernels.ahead_of_time.budgets import Figures
from mixforge.kernels.launch import Launch

TARGETS: dict[str, Any] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_TILE_OPERATION = re.compile(
    r"\btt\.(?:load|store|dot|reduce|scan|atomic_rmw|descriptor_load|descriptor_store)\b"
)
# Operands of 16 bits, or float32 that may be cut to TF32.
_MATRIX_DOT = re.compile(r"\btt\.dot\b.*(?:x(?:bf16|f16)> \*|inputPrecision = tf32)")
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_MATRIX = re.compile(r"[A-Z0-9]+MMA\b")
_GCN_LINE = re.compile(r"^\t([a-z]+_\w+)", re.MULTILINE)


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
        "num_warps": launch.config.warps,
        "num_stages": launch.config.stages,
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
        {name: vars(options)[name] for name in ("num_warps", "num_stages", "debug")},
    )


def compile_unit(wanted: Unit) -> Figures:
    """Compile without a cache, and read the figures."""
    kernel = getattr(import_module(wanted.module), wanted.kernel)
    source = ASTSource(kernel, wanted.signature, wanted.constants, wanted.attributes)
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        triton.knobs.compilation.scope(),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        start = time.perf_counter()
        with _first_error():
            compiled = triton.compile(source, target=TARGETS[wanted.target], options=dict(wanted.options))
        seconds = time.perf_counter() - start
    middle = compiled.asm["ttir"]
    read = _read_gcn if "amdgcn" in compiled.asm else _read_sass
    return Figures(
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0),
        least_instructions=len(_TILE_OPERATION.findall(middle)),
        wants_matrix=_MATRIX_DOT.search(middle) is not None,
        compile_s=seconds,
        **read(compiled.asm),
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


def _read_sass(assembly: Mapping[str, Any]) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(assembly["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(file))
        names = _SASS_LINE.findall(_tool("nvdisasm", "-ndf", "-c", str(file)))
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack_bytes": _number(r"STACK:(\d+)", usage),
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
        # A kernel is filled up with NOPs.
        "instructions": sum(name != "NOP" for name in names),
        "matrix_instructions": sum(_SASS_MATRIX.match(name) is not None for name in names),
    }


def _read_gcn(assembly: Mapping[str, Any]) -> dict[str, int]:
    text = assembly["amdgcn"]
    names = _GCN_LINE.findall(text)
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "instructions": sum(name != "s_nop" for name in names),
        "matrix_instructions": sum("mfma" in name for name in names),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise LookupError(f"no {pattern} in what the compiler says of a kernel: {text[:200]!r}")
    return int(found[1])


def _tool(name: str, *words: str) -> str:
    done = subprocess.run([_tools()[name], *words], capture_output=True, text=True, check=True)
    return done.stdout


@cache
def _tools() -> dict[str, str]:
    """The paths of NVIDIA's tools that come with Triton."""
    return {"cuobjdump": triton.knobs.nvidia.cuobjdump.path, "nvdisasm": triton.knobs.nvidia.nvdisasm.path}
