"""Building on torch's device `meta`, where tensors have shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ELEMENTWISE = frozenset(
    [
        *("add", "__add__", "__radd__", "sub", "__sub__", "rsub", "__rsub__"),
        *("mul", "__mul__", "__rmul__", "div", "__truediv__", "__rtruediv__", "__rdiv__"),
        *("pow", "__pow__", "__rpow__", "remainder", "__mod__", "neg", "__neg__"),
        *("exp", "expm1", "log", "sqrt", "sin", "cos"),
    ]
)


@contextmanager
def on_meta() -> Iterator[None]:
    """Makes tensors on `meta`. Nothing is drawn, and the shapes of what first weights are made by are found here:

    torch 2.13 would import its compiler to find them, which takes seconds of a process (docs/benchmarks.md).
    """
    with torch.device("meta"), _Shapes():
        yield


class _Shapes(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        tensors = [x for x in args if isinstance(x, Tensor)]
        is_on_meta = any(x.is_meta for x in tensors)
        if name == "normal_":
            return args[0] if args else kwargs["tensor"]
        if name == "randn":
            return torch.empty(*args, **kwargs)
        if name in ("randn_like", "ones_like") and is_on_meta and not kwargs:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
        if name in ("arange", "linspace", "eye") and "device" not in kwargs:
            return function(*args, **kwargs, device="cpu").to("meta")
        if name == "repeat" and is_on_meta:
            return function(_one(args[0]).expand(args[0].shape), *args[1:], **kwargs).to("meta")
        if name in ELEMENTWISE and is_on_meta and not kwargs:
            # One number of each tensor tells the dtype; one number in many places, the shape.
            dtype = function(*(_one(x) if isinstance(x, Tensor) else x for x in args)).dtype
            spread = torch.broadcast_tensors(*(_one(x).expand(x.shape) for x in tensors))  # type: ignore[no-untyped-call]
            return torch.empty(spread[0].shape, dtype=dtype, device="meta")
        return function(*args, **kwargs)


def _one(x: Tensor) -> Tensor:
    """A number of a tensor's dtype, in as many dims."""
    return torch.ones([1] * x.dim(), dtype=x.dtype, device="cpu")
