"""What the operations of the linear family accept, whatever the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from mixforge.kernels.packed import check_packed


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError naming the argument, what it was and what it must be.

    Values are looked at where they are at hand: a GPU would have to be waited for.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [batch, time, heads, dim]")
        if tensor.dtype != v.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and v is {v.dtype}; they must have one dtype")
    check_heads(q, k, v)
    batch, length, _, keys = q.shape
    heads, values = v.shape[2:]
    sequences = batch
    if cu_seqlens is not None:
        check_packed(cu_seqlens, batch, length)
        sequences = cu_seqlens.shape[0] - 1
    check_shape("decay", decay, (heads,), (batch, length, heads), (batch, length, heads, keys))
    check_shape("beta", beta, (batch, length, heads))
    check_shape("state", state, (sequences, heads, keys, values))
    others = {"k": k, "v": v, "decay": decay, "beta": beta, "state": state, "cu_seqlens": cu_seqlens}
    for name, given in others.items():
        if given is not None and given.device != q.device:
            raise ValueError(f"{name} is on {given.device} and q on {q.device}; put both on one device")
    is_at_hand = q.device.type == "cpu" and not torch.compiler.is_compiling()
    # A NaN passes: it is a diverged model, which the training loop reports.
    if decay is not None and is_at_hand and (decay > 0).any():
        raise ValueError(
            f"log decays must be at most 0, got {decay.max().item():g}; give log(decay), not decay"
        )


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where one of [batch, time, heads, dim] is empty, or v has no multiple of the heads of q and k."""
    for name, size in zip(("batch", "length", "number of heads"), q.shape, strict=False):
        if size == 0:
            raise ValueError(f"q has a {name} of 0 (shape {list(q.shape)}); it must be at least 1")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {list(k.shape)}; it must be that of q, {list(q.shape)}")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v has shape {list(v.shape)}; it must begin as q does, {list(q.shape)}")
    if v.shape[2] % q.shape[2] != 0:
        raise ValueError(
            f"{v.shape[2]} value heads are no multiple of {q.shape[2]} key heads; "
            "give every key head the same number of value heads"
        )


def check_shape(name: str, tensor: Tensor | None, *legal: tuple[int, ...]) -> None:
    """Raise ValueError where a tensor that is there has none of these shapes."""
    if tensor is not None and tuple(tensor.shape) not in legal:
        known = ", ".join(str(list(shape)) for shape in legal)
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; it must be {'one of ' * (len(legal) > 1)}{known}"
        )
