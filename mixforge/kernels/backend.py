"""The Triton form of an operation, imported when it is asked for: a machine without Triton imports everything else."""

from __future__ import annotations

import importlib
import os
from typing import Any


class BeyondKernels(ValueError):
    """A size that no kernel of the backend takes; the message says which, and what the most is."""


def triton_form(module: str, name: str) -> Any:
    """A function of `mixforge.kernels.<module>_triton`. Raises ValueError where Triton is not installed."""
    try:
        return getattr(importlib.import_module(f"mixforge.kernels.{module}_triton"), name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError(
            "backend='triton' needs the package triton, which is not installed here; it exists for Linux: "
            "`pip install triton`, or build with backend='torch'"
        ) from error


def check_backend(backend: str, device: str) -> None:
    """Raise ValueError where a backend cannot run on a device, before anything is built for it."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and device.partition(":")[0] != "cuda" and not is_interpreted:
        raise ValueError(
            f"backend='triton' runs on a GPU, and the device is {device!r}: name one with --device cuda, or use "
            "backend='torch'"
        )
