"""Puts this folder on the path: `tolerance` is shared with the folders below. Ends a process that has lost its GPU."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch


@pytest.fixture(autouse=True)
def _lost_device(request: pytest.FixtureRequest) -> Generator[None]:
    """After an illegal access a process can use its device no more, and all tests behind it would fail for that."""
    yield
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            # pytest-xdist says which test it was, and starts another process.
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process after {request.node.nodeid}: {error}", returncode=1)
