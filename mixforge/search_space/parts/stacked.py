"""Matrices that a module keeps stacked, as experts or the blocks of a block-diagonal matrix."""

from __future__ import annotations

from torch import nn


class Stacked(nn.Module):
    """`weight` [N, ., .] has N matrices, each a linear map of its own. Abstract."""

    weight: nn.Parameter
