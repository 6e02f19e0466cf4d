"""Matmul FLOPs of what runs, by torch's own formulas for each operation.

`FlopCounterMode` gives the same sum, and takes three times as long: it follows which module each operation belongs to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper


def sdpa_cpu(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    """The fused CPU attention, which torch's counter does not know; grouped keys count for each query head."""
    heads = query[:2]
    return sdpa_flop_count(query, (*heads, *key[2:]), (*heads, *value[2:]))


def lstm_cpu(
    given: tuple[int, ...],
    from_input: tuple[int, ...],
    from_output: tuple[int, ...],
    *_: object,
    **__: object,
) -> int:
    """The fused LSTM of a CPU, which torch's counter does not know: x [T, B, D], weights [4H, D] and [4H, H]."""
    return 2 * given[0] * given[1] * from_input[0] * (from_input[1] + from_output[1])


FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(sdpa_cpu),
    torch.ops.aten.mkldnn_rnn_layer: shape_wrapper(lstm_cpu),
}


class Flops(TorchDispatchMode):
    """`total` of all that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=made)
        return made
