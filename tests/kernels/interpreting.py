"""Triton's interpreter with bfloat16 and without its waste.

A launch puts the interpreter's functions in the place of the language's, and each call of a device function does so
again, for which it looks at every name of the language. That is most of the time of a small kernel: here it is done once
in a launch.

The interpreter keeps a bfloat16 as its bits, multiplies those bits in a product of matrices, and cuts a float32 where a
device rounds it to the nearest. Here operands are widened, as a tensor core takes them, and numbers are rounded. All
other arithmetic on bfloat16 stays garbage, so that a kernel that does any fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

_make_ready: Callable[[Any], Any] = interpreter._patch_lang
_launch: Callable[..., None] = interpreter.GridExecutor.__call__
_convert: Callable[..., Any] = interpreter._convert_float
_dot: Callable[..., Any] = interpreter.InterpreterBuilder.create_dot
_ready: set[str] = set()


def _make_ready_once(function: Any) -> Any:
    if function.__module__ in _ready:
        return None
    _ready.add(function.__module__)
    return _make_ready(function)


def _launch_anew(executor: Any, *args: Any, **words: Any) -> None:
    _ready.clear()
    _launch(executor, *args, **words)


def _converted(values: Any, before: Any, after: Any, rounding: Any) -> Any:
    """The bits in another type."""
    if (before, after) == (tl.bfloat16, tl.float32):
        return values.astype(np.uint32) << 16
    if (before, after) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(values).view(np.uint32)
        # To the nearest, of two as near to the even one. A NaN stays one.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
    return _convert(values, before, after, rounding)


def _wide(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _wide_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
    return _dot(builder, _wide(a), _wide(b), *others)


def install() -> None:
    """For all launches of this process."""
    interpreter._patch_lang = _make_ready_once
    interpreter.GridExecutor.__call__ = _launch_anew
    interpreter._convert_float = _converted
    interpreter.InterpreterBuilder.create_dot = _wide_dot
