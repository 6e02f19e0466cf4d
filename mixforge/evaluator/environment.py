"""Where a figure was measured: device, driver, versions and commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

import mixforge
from mixforge.evaluator.evaluation import Environment


def environment(device: str = "cpu") -> Environment:
    """What there is to say of a device (`cpu`, `cuda`, `cuda:1`) in this process.

    Raises ValueError without one.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and (index or "0") in map(str, range(torch.cuda.device_count())):
        name, driver, clock_mhz = _cuda(int(index or 0))
        count = torch.cuda.device_count()
    elif device == "cpu":
        name, driver, clock_mhz = _cpu_name(), None, _cpu_clock_mhz()
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    else:
        raise ValueError(f"device {device!r} is not here; there is cpu" + _cuda_devices())
    return Environment(
        device=name,
        device_kind="cuda" if kind == "cuda" else "cpu",
        device_count=count,
        driver=driver,
        clock_mhz=clock_mhz,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_triton(),
        mixforge=mixforge.__version__,
        commit=_commit(),
        host=hashlib.sha256(platform.node().encode()).hexdigest()[:16],
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def _cuda_devices() -> str:
    return "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))


@lru_cache(maxsize=8)
def _cuda(index: int) -> tuple[str, str | None, float | None]:
    """Name, driver version and highest clock; the last two as nvidia-smi says, None where it is absent."""
    said = _output(
        "nvidia-smi",
        f"--id={index}",
        "--query-gpu=driver_version,clocks.max.sm",
        "--format=csv,noheader,nounits",
    )
    driver, clock = said.split(", ") if said else (None, None)
    return torch.cuda.get_device_name(index), driver, float(clock) if clock else None


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def _cpu_clock_mhz() -> float | None:
    """The highest clock, which does not change between measurements as the present one does."""
    limit = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    return float(limit.read_text()) / 1000 if limit.exists() else None


def _triton() -> str | None:
    """That which runs, where it is imported: what is installed beside it may be another."""
    found = getattr(sys.modules.get("triton"), "__version__", None)
    return found or _version("triton")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _commit() -> str | None:
    root = Path(mixforge.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+dirty" if commit and changed else commit


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not installed, fails, or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
