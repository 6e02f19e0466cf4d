"""Reading what a kernel uses out of what was compiled: its registers, its memory and its instructions."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import sm_arch_from_capability

_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_MATRIX = re.compile(r"[A-Z0-9]+MMA\b")
_SASS_BYTES = 16
_BUFFER = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
_DOT = re.compile(r"ttng\.warp_group_dot (%\w+)(?:#\d+)?, (%\w+)(?:#\d+)?,")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*\{pendings = (\d+)")
_COPY = re.compile(r"ttg\.async_copy_global_to_local %[\w#]+, (%\w+)")
_LAYOUT = re.compile(
    r"(#mma\d*) = #ttg\.nvidia_mma<\{versionMajor = 3\b[^>]*instrShape = \[\d+, (\d+), \d+\]"
)
_GCN_LINE = re.compile(r"^\t([a-z]+_\w+)", re.MULTILINE)


def read_sass(cubins: Sequence[bytes], capability: int) -> list[dict[str, int]]:
    """The figures of kernels for one NVIDIA device.

    The disassembler takes 0.4 s to start, so it is given the code of all kernels as one.
    """
    codes = [_code(cubin) for cubin in cubins]
    architecture = sm_arch_from_capability(capability).replace("sm_", "SM")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels"
        file.write_bytes(b"".join(codes))
        names = _SASS_LINE.findall(_tool("nvdisasm", "-ndf", "--binary", architecture, str(file)))
        usages = []
        for cubin in cubins:
            file.write_bytes(cubin)
            usages.append(_tool("cuobjdump", "--dump-resource-usage", str(file)))
    if len(names) * _SASS_BYTES != sum(map(len, codes)):
        raise LookupError(f"nvdisasm names {len(names)} instructions in {sum(map(len, codes))} bytes of code")
    found, start = [], 0
    for code, usage in zip(codes, usages, strict=True):
        end = start + len(code) // _SASS_BYTES
        found.append(_sass_figures(names[start:end], usage))
        start = end
    return found


def sass(cubin: bytes) -> str:
    """The code of a kernel for one NVIDIA device, with the labels that its branches go to."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel"
        file.write_bytes(cubin)
        return _tool("nvdisasm", "-c", str(file))


def _sass_figures(names: Sequence[str], usage: str) -> dict[str, int]:
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack_bytes": _number(r"STACK:(\d+)", usage),
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
        # A kernel is filled up with NOPs.
        "instructions": sum(name != "NOP" for name in names),
        "matrix_instructions": sum(_SASS_MATRIX.match(name) is not None for name in names),
    }


def _code(cubin: bytes) -> bytes:
    """The instructions in a cubin, which is an ELF file of 64 bits: its sections `.text.NAME`."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, naming = struct.unpack_from("<3H", cubin, 0x3A)
    # Of a section: where its name is, its type, its flags, its address, where it begins, and its bytes.
    sections = [struct.unpack_from("<2I4Q", cubin, start + number * size) for number in range(count)]
    names = sections[naming][4]
    return b"".join(
        cubin[section[4] : section[4] + section[5]]
        for section in sections
        if cubin.startswith(b".text.", names + section[0])
    )


def read_hazards(middle: str) -> tuple[str, ...]:
    """What Triton's own program for Hopper, before LLVM, does that has given wrong numbers on a device.

    Source: triton-lang/triton issue 10629 for the first; the second was found by the tests of this package on an H100.
    """
    narrow = {name for name, columns in _LAYOUT.findall(middle) if columns == "8"}
    depths, owners = (
        {name: int(depth) for name, depth in _BUFFER.findall(middle)},
        dict(_VIEW.findall(middle)),
    )
    found: dict[str, None] = {}
    flying: list[tuple[str, str]] = []
    for line in middle.splitlines():
        if "scf.for" in line:
            flying = []
        elif dot := _DOT.search(line):
            if "xf32, #shared" in line and any(f", {name}>" in line.rpartition("->")[2] for name in narrow):
                found["multiplies TF32 eight columns at a time, which reads beyond its operands"] = None
            if "isAsync = true" in line:
                flying.append((_owner(dot[1], owners), _owner(dot[2], owners)))
        elif wait := _WAIT.search(line):
            pending = int(wait[1])
            flying = flying[-pending:] if pending else []
        elif copy := _COPY.search(line):
            buffer = _owner(copy[1], owners)
            if depths.get(buffer) == 1 and any(buffer in operands for operands in flying):
                found["fills a buffer again while a product that reads it is under way"] = None
    return tuple(found)


def _owner(name: str, owners: Mapping[str, str]) -> str:
    """The buffer that a view is of."""
    while name in owners:
        name = owners[name]
    return name


def read_gcn(assembly: str) -> dict[str, int]:
    """The figures of a kernel for an AMD device, from its assembly."""
    names = _GCN_LINE.findall(assembly)
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
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
def _tools() -> Mapping[str, Any]:
    """The paths of NVIDIA's tools that come with Triton."""
    return {"cuobjdump": triton.knobs.nvidia.cuobjdump.path, "nvdisasm": triton.knobs.nvidia.nvdisasm.path}
