"""Counters that check the formulas: the truth of a cost is the mixer's own `cost`, and these are the witnesses.

Both count matmul FLOPs of a forward pass, two for each multiply-add. Neither sees element-wise work. torch's counter
lacks a formula for fused attention and for an LSTM on a CPU and fvcore one for fused attention anywhere, so they are
given here;
neither halves causal attention. fvcore sees nothing inside a custom autograd function; torch's counter does.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_params(model: nn.Module) -> int:
    """Weights, those that are used in several places once."""
    return sum(weight.numel() for weight in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module, tokens_BT: Tensor) -> int:
    """FLOPs of `model(tokens_BT)` as torch's counter sees the operations that run."""
    formula: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten.mkldnn_rnn_layer: _lstm_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formula)
    with counter:
        model(tokens_BT)
    return counter.get_total_flops()


def count_flops_by_trace(model: nn.Module, tokens_BT: Tensor) -> int:
    """The same by fvcore, from a traced graph. It counts multiply-adds, which are doubled here, and only here."""
    with warnings.catch_warnings():
        # fvcore traces with torch.jit, which torch has deprecated; its import warns too, and takes most of a second,
        # so it is made where the counter is used.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, (tokens_BT,))
        analysis.set_op_handle("aten::scaled_dot_product_attention", _traced_attention)
        # fvcore counts norms and activations of its own list, five operations an element; they are no products.
        analysis.set_op_handle(**dict.fromkeys(_NOT_PRODUCTS))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
        with torch.no_grad():
            return 2 * int(analysis.total())


_NOT_PRODUCTS = (
    "aten::batch_norm",
    "aten::group_norm",
    "aten::layer_norm",
    "aten::instance_norm",
    "aten::upsample_nearest2d",
    "aten::upsample_bilinear2d",
    "aten::adaptive_avg_pool2d",
    "aten::grid_sampler",
)


def _attention_flops(query: object, key: object, value: object, *args: object, **kwargs: object) -> int:
    """torch's counter passes shapes: q [B, H, T, K], k [B, H, S, K], v [B, H, S, V]."""
    assert isinstance(query, list | tuple | torch.Size)
    assert isinstance(key, list | tuple | torch.Size)
    assert isinstance(value, list | tuple | torch.Size)
    return 2 * _attention_products(tuple(query), tuple(key), tuple(value))


def _lstm_flops(
    given: object, from_input: object, from_output: object, *args: object, **kwargs: object
) -> int:
    """Shapes of x [T, B, D] and of the weights [4H, D] and [4H, H]."""
    assert isinstance(given, list | tuple | torch.Size)
    assert isinstance(from_input, list | tuple | torch.Size)
    assert isinstance(from_output, list | tuple | torch.Size)
    return 2 * math.prod(given[:2]) * (math.prod(from_input) + math.prod(from_output))


def _traced_attention(inputs: list[object], outputs: list[object]) -> int:
    query, key, value = (tuple(each.type().sizes()) for each in inputs[:3])  # type: ignore[attr-defined]
    return _attention_products(query, key, value)


def _attention_products(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> int:
    """Multiply-adds of q k^T and of the weights times v, over the whole square."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
