"""What operations accept of the tensors that they are given, whatever the backend.

What is raised is a ValueError that names the argument, what it was and what it must be. Values are looked at over
sequences alone: a step is run for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixforge.kernels.packed import check_packed

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A log gate that is a difference of running maxima is above zero by their rounding: by 0.004 where these grow to 2^16.
ROUNDING = 0.01
# The size along an axis, where it is not called as the axis is.
CALLED = {"time": "length", "heads": "number of heads"}


def check_axes(name: str, given: Tensor, axes: str) -> None:
    """Raise ValueError where a tensor has other axes than those named, as in "batch, time, dim", or nothing along one."""
    if given.dim() == axes.count(",") + 1 and given.numel() > 0:
        return
    names = axes.split(", ")
    if given.dim() != len(names):
        raise ValueError(f"{name} has shape {list(given.shape)}; it must be [{axes}]")
    for axis, size in zip(names, given.shape, strict=True):
        if size == 0:
            called = CALLED.get(axis, axis)
            raise ValueError(f"{name} has a {called} of 0 (shape {list(given.shape)}); it must be at least 1")


def check_shape(
    name: str, given: Tensor | None, *shapes: Sequence[int | str], is_needed: bool = False
) -> None:
    """Raise ValueError where a tensor has none of some shapes, in which a name is any size.

    None passes unless the tensor is needed.
    """
    if given is None:
        if is_needed:
            raise ValueError(f"{name} is None; it must be a tensor of shape {_said(shapes)}")
    elif given.shape not in shapes and not any(_fits(given.shape, shape) for shape in shapes):
        raise ValueError(f"{name} has shape {list(given.shape)}; it must be {_said(shapes)}")


def _fits(found: Sequence[int], shape: Sequence[int | str]) -> bool:
    return len(found) == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(found, shape, strict=True)
    )


def _said(shapes: Sequence[Sequence[int | str]]) -> str:
    said = ", ".join(f"[{', '.join(str(size) for size in shape)}]" for shape in shapes)
    return said if len(shapes) == 1 else f"one of {said}"


def check_one_device(**tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor is not where the first one is."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise ValueError(
                f"{name} is on {tensor.device} and {first[0]} on {first[1]}; put both on one device"
            )


def check_alike(**tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor is not where the first one is, or of a dtype that does not go with its.

    float32 goes with bfloat16 and with float16: all is worked out in float32 then. Beside float64 all is float64.
    """
    first: tuple[str, torch.dtype, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None or (first is not None and (tensor.dtype, tensor.device) == first[1:]):
            continue
        if first is not None and tensor.device != first[2]:
            check_one_device(**tensors)
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, float64, bfloat16 or float16")
        first = first or (name, tensor.dtype, tensor.device)
        pair = (tensor.dtype, first[1])
        if tensor.dtype != first[1] and (torch.float64 in pair or torch.float32 not in pair):
            raise ValueError(
                f"{name} is {tensor.dtype} and {first[0]} is {first[1]}; they must have one dtype, or one of them "
                "float32 and the other bfloat16 or float16"
            )


def is_at_hand(given: Tensor) -> bool:
    """Whether values can be looked at: a GPU would have to be waited for, and a tensor of another class may have none."""
    is_plain = type(given) in (Tensor, nn.Parameter)
    return is_plain and given.device.type == "cpu" and not torch.compiler.is_compiling()


def check_log(name: str, given: Tensor, least: float | None = None, rounding: float = 0.0) -> None:
    """Raise ValueError where the logarithm of what a state is scaled by is above 0 by more than rounding, or too low.

    A NaN passes: it is a diverged model, which the training loop reports.
    """
    if not is_at_hand(given):
        return
    # Of float32 the largest value along all axes takes a third of the time of `max` or `aminmax`.
    values = given.detach()
    high = values.amax().item()
    if least is None:
        if high > rounding:
            raise ValueError(f"{name} must be at most 0, got {high:g}; give log(decay), not decay")
        return
    low = values.amin().item()
    if low < least or high > rounding:
        raise ValueError(
            f"{name} must lie in [{least:g}, 0], got {low:g} to {high:g}; bound it, as by {least:g} * sigmoid(x)"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where q, k and v are not [batch, time, heads, dim], or v has no multiple of the others' heads."""
    for name, given in (("q", q), ("k", k), ("v", v)):
        check_axes(name, given, "batch, time, heads, dim")
    check_shape("k", k, q.shape)
    check_shape("v", v, (*q.shape[:2], "heads", "dim"))
    if v.shape[2] % q.shape[2] != 0:
        raise ValueError(
            f"{v.shape[2]} value heads are no multiple of {q.shape[2]} key heads; "
            "give every key head the same number of value heads"
        )


def states_of(first: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many states there are: one for each sequence. Raises ValueError where `cu_seqlens` does not fit [B, T, ...]."""
    batch, length = first.shape[:2]
    if cu_seqlens is None:
        return batch
    check_one_device(inputs=first, cu_seqlens=cu_seqlens)
    check_packed(cu_seqlens, batch, length)
    return cu_seqlens.shape[0] - 1


def wants_gradient(*given: Tensor | None) -> bool:
    """Whether an operation on these has to keep what a gradient is made of."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
