"""Every class that can be imported, held against transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from classes import CLASSES, Size
from comparison import assert_same


@pytest.mark.parametrize("name", CLASSES)
def test_logits_and_steps_agree(name: str, tmp_path: Path) -> None:
    assert_same(CLASSES[name](Size()), tmp_path)
