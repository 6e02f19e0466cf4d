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
    batch, length, key_heads, keys = q.shape
    heads, values = v.shape[2:]
    if 0 in (batch, length, key_heads):
        name = "batch" if batch == 0 else "length" if length == 0 else "number of heads"
        raise ValueError(f"q has a {name} of 0 (shape {list(q.shape)}); it must be at least 1")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {list(k.shape)}; it must be that of q, {list(q.shape)}")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v has shape {list(v.shape)}; it must begin as q does, {list(q.shape)}")
    if heads % key_heads != 0:
        raise ValueError(
            f"{heads} value heads are no multiple of {key_heads} key heads; "
            "give every key head the same number of value heads"
        )
    sequences = batch
    if cu_seqlens is not None:
        check_packed(cu_seqlens, batch, length)
        sequences = cu_seqlens.shape[0] - 1
    legal = [(heads,), (batch, length, heads), (batch, length, heads, keys)]
    if decay is not None and tuple(decay.shape) not in legal:
        known = ", ".join(str(list(shape)) for shape in legal)
        raise ValueError(f"decay has shape {list(decay.shape)}; it must be one of {known}")
    if beta is not None and tuple(beta.shape) != legal[1]:
        raise ValueError(f"beta has shape {list(beta.shape)}; it must be {list(legal[1])}")
    if state is not None and tuple(state.shape) != (sequences, heads, keys, values):
        raise ValueError(
            f"state has shape {list(state.shape)}; it must be {[sequences, heads, keys, values]}"
        )
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
