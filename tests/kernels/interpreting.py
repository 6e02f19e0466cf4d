"""Triton's interpreter with bfloat16 and without its waste.

A launch puts the interpreter's functions in the place of the language's, and each call of a device function does so
again, for which it looks at every name of the language. That is most of the time of a small kernel: here it is done once
in a launch. Types are made anew for each operation; here those of a shape share what is worked out from it. That no
integer runs over is worked out for each sum and product, and not looked at without the interpreter's debug option; here
it is not worked out.

The interpreter keeps a bfloat16 as its bits, multiplies those bits in a product of matrices, and cuts a float32 where a
device rounds it to the nearest. Here operands are widened, as a tensor core takes them, and numbers are rounded. All
other arithmetic on bfloat16 stays garbage, so that a kernel that does any fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_make_ready: Callable[[Any], Any] = interpreter._patch_lang
_launch: Callable[..., None] = interpreter.GridExecutor.__call__
_convert: Callable[..., Any] = interpreter._convert_float
_dot: Callable[..., Any] = interpreter.InterpreterBuilder.create_dot
_block: Callable[..., None] = tl.block_type.__init__
_equal: Callable[[Any, Any], bool] = tl.dtype.__eq__
_broadcast: Callable[..., Any] = TritonSemantic.broadcast_impl_value
_numpy: Callable[[Any], Any] = interpreter._get_np_dtype
_ready: set[str] = set()
_blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
_numpy_of: dict[str, Any] = {}


def _make_ready_once(function: Any) -> Any:
    if function.__module__ in _ready:
        return None
    _ready.add(function.__module__)
    return _make_ready(function)


def _launch_anew(executor: Any, *args: Any, **words: Any) -> None:
    _ready.clear()
    _launch(executor, *args, **words)


def _known_block(self: Any, element: Any, shape: Any) -> None:
    """A type of blocks. A name says all of the type of an element."""
    key = (element.name, tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape))
    if key not in _blocks:
        _block(self, element, shape)
        _blocks[key] = dict(vars(self))
    vars(self).update(_blocks[key])


def _tensor(self: Any, handle: Any, kind: Any) -> None:
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    sizes = tuple(kind.shape) if kind.is_block() else ()
    if sizes not in _shapes:
        numel = tl.constexpr(math.prod(sizes))
        _shapes[sizes] = numel, tl.core.tuple([tl.constexpr(size) for size in sizes])
    self.numel, self.shape = _shapes[sizes]


def _same(kind: Any, other: Any) -> bool:
    return kind is other or _equal(kind, other)


def _unchecked(semantic: Any, left: Any, right: Any, operation: Any) -> None:
    """Whether an integer runs over."""


def _as_wide(semantic: Any, left: Any, right: Any) -> Any:
    """Both in the shape of both."""
    return (left, right) if left.shape is right.shape else _broadcast(semantic, left, right)


def _numpy_type(kind: Any) -> Any:
    name = kind.scalar.name
    if name not in _numpy_of:
        _numpy_of[name] = _numpy(kind)
    return _numpy_of[name]


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
    interpreter._get_np_dtype = _numpy_type
    interpreter._convert_float = _converted
    interpreter.InterpreterBuilder.create_dot = _wide_dot
    TritonSemantic.binary_op_sanitize_overflow_impl = _unchecked
    TritonSemantic.broadcast_impl_value = _as_wide
    tl.block_type.__init__ = _known_block
    tl.tensor.__init__ = _tensor
    tl.dtype.__eq__ = _same
