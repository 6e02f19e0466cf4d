"""The Triton form of an operation, imported when it is asked for: a machine without Triton imports everything else."""

from __future__ import annotations

import importlib
from typing import Any


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
