"""What the operations of the linear family accept, whatever the backend."""

from __future__ import annotations

from torch import Tensor

from mixforge.kernels.operands import check_heads, check_log, check_one_device, check_shape, states_of


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
    check_heads(q, k, v)
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dtype != v.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and v is {v.dtype}; they must have one dtype")
    check_one_device(q=q, k=k, v=v, decay=decay, beta=beta, state=state)
    tokens, heads, keys = v.shape[:3], v.shape[2], q.shape[3]
    check_shape("decay", decay, (heads,), tokens, (*tokens, keys))
    check_shape("beta", beta, tokens)
    check_shape("state", state, (states_of(q, cu_seqlens), heads, keys, v.shape[3]))
    if decay is not None:
        check_log("decay", decay)
