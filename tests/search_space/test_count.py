"""A count and its noun agree."""

from __future__ import annotations

import pytest

from mixforge.search_space.count import counted


@pytest.mark.parametrize(
    ("number", "text", "said"),
    [
        (0, None, "0 trials"),
        (1, None, "1 trial"),
        (2, None, "2 trials"),
        (1.0, "1", "1 trial"),
        (1.5, "1.5", "1.5 trials"),
        (12_345, "12,345", "12,345 trials"),
    ],
)
def test_a_noun_follows_its_number(number: float, text: str | None, said: str) -> None:
    assert counted(number, "trial", text) == said
