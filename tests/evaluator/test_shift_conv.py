"""The convolution in front of tasks of recall."""

from __future__ import annotations

import torch

from mixforge.evaluator.shift_conv import ShiftConv


def test_front_is_causal_and_starts_as_a_shift() -> None:
    front = ShiftConv(4)
    x_BTD = torch.randn(2, 7, 4)
    y_BTD = front(x_BTD)
    expected = x_BTD.clone()
    expected[:, 1:, ::2] += x_BTD[:, :-1, ::2]
    torch.testing.assert_close(y_BTD, expected)
    torch.nn.init.normal_(front.taps_DW)
    changed = x_BTD.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(front(changed)[:, :4], front(x_BTD)[:, :4])
