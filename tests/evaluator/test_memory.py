"""The memory that work takes at its highest."""

from __future__ import annotations

import pytest
import torch

from mixforge.evaluator.memory import check_room, peak_bytes


def test_peak_is_of_what_is_held_at_one_time() -> None:
    def work() -> None:
        a = torch.ones(1000)  # 4 kB held
        b = a + 1  # 8 kB
        del a
        c = torch.empty(3000)  # 16 kB
        c.add_(1)
        c.view(-1)
        c.sin()  # 28 kB
        del b, c
        torch.ones(2000)

    assert peak_bytes(work, "cpu") == 28_000


def test_what_was_there_before_does_not_count() -> None:
    weight = torch.ones(1000, requires_grad=True)

    def work() -> None:
        (weight * 2).sum().backward()

    # The product, its sum and gradients: the weight itself was there.
    assert 4_000 <= peak_bytes(work, "cpu") < 16_000


def test_what_is_kept_for_the_backward_pass_counts() -> None:
    x = torch.ones(1000, requires_grad=True)

    def work() -> None:
        y = x
        for _ in range(10):
            y = y.sin()
        y.sum().backward()

    assert peak_bytes(work, "cpu") >= 40_000


def test_room_is_checked_before_memory_is_asked_for() -> None:
    check_room(1_000_000, "cpu")
    with pytest.raises(MemoryError, match="predicted: training 1,000,000,000,000 weights"):
        check_room(10**12, "cpu")
