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
