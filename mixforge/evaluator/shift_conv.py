"""The short convolution that tasks of recall put in front of every stack, so that small budgets measure capacity.

Source: Arora et al. 2024 (arXiv 2402.18668), where one stands in front of every mixer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShiftConv(nn.Module):
    """y_t = x_t + sum_j w_j * x_{t-2+j}: three causal taps for each channel, [B, T, D] -> [B, T, D].

    Every other channel starts with the token before added, so that a pair meets in one vector from the
    first step on.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        taps_DW = torch.zeros(width, 3)
        taps_DW[::2, 1] = 1.0
        self.taps_DW = nn.Parameter(taps_DW)

    def forward(self, x_BTD: Tensor) -> Tensor:
        past_BDT = F.pad(x_BTD.transpose(1, 2), (2, 0))
        return x_BTD + F.conv1d(past_BDT, self.taps_DW[:, None], groups=x_BTD.shape[2]).transpose(1, 2)
