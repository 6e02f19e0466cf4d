"""Kernels under Triton's interpreter, run by `make interpreted`.

It must be asked for before Triton is imported: without TRITON_INTERPRET=1, or without Triton, nothing here is collected.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import interpreting

    interpreting.install()
    collect_ignore_glob = []
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Generator[None]:
    """Memory that is not written yet is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
