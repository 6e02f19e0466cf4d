"""One call of an operation, for a shape class: on meta tensors for the gate, on a device for the tuner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = tuple[Callable[..., Any], Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is called, with which templates, and at which sizes."""

    op: str
    variant: str
    """What of the operation it uses, such as `scalar, delta`."""
    dtype: torch.dtype
    sizes: Mapping[str, int]
    """By the letters of the shape suffixes."""
    call: Callable[[Case], Call]
    """The function and its arguments. Tensors that need a gradient say so, and get one."""
    reference: Callable[..., Any] | None = None
    """The form that is right by its equations, with the same arguments; None where the tuner leaves it alone."""
    device: str = "meta"

    @property
    def label(self) -> str:
        sizes = " ".join(f"{name}{size}" for name, size in self.sizes.items())
        return f"{self.op} ({self.variant}) {sizes} {str(self.dtype).removeprefix('torch.')}"

    def tensor(
        self,
        *letters: str,
        dtype: torch.dtype | None = None,
        low: float = -1.0,
        high: float = 1.0,
        grad: bool = True,
    ) -> Tensor:
        """A tensor, its sizes given by their letters, its values uniform where it has any."""
        shape = [self.sizes[letter] for letter in letters]
        dtype = dtype or self.dtype
        if self.device == "meta":
            return torch.empty(shape, device="meta", dtype=dtype, requires_grad=grad)
        values = torch.empty(shape, device=self.device).uniform_(low, high).to(dtype)
        return values.requires_grad_(grad)
