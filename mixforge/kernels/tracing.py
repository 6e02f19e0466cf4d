"""What `torch.compile` asks of what it traces."""

from __future__ import annotations

import torch
from torch import Tensor


def fixed(size: int) -> int:
    """A size, for which a compiler then traces anew, where it would take a symbol for the second size that it sees.

    For what makes as many steps as a length asks for: each length is another graph in any case, and symbols are slow.
    """
    return len(range(size))


def unaliased(x: Tensor) -> Tensor:
    """x, for a forward to return; traced, a copy, which no other value of that forward is or views.

    Without it torch 2.11 loses the gradient of a result that was written in place or is a view, as its tracer takes all
    that a forward makes for results (pytorch issue 180642), and torch 2.13 that of an input given back.
    """
    return x.clone() if torch.compiler.is_compiling() else x
