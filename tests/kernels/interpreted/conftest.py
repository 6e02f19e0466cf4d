"""Kernels under Triton's interpreter, which must be set before Triton is imported: `test_interpreted` starts it."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Generator[None]:
    """Memory that is not written yet is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
