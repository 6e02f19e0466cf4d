"""Triton's interpreter without its waste: it makes the language ready once in a launch, not at each call within.

A launch puts the interpreter's functions in the place of the language's, and each call of a device function does so
again, for which it looks at every name of the language. That is most of the time of a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter

_make_ready: Callable[[Any], Any] = interpreter._patch_lang
_launch: Callable[..., None] = interpreter.GridExecutor.__call__
_ready: set[str] = set()


def _make_ready_once(function: Any) -> Any:
    if function.__module__ in _ready:
        return None
    _ready.add(function.__module__)
    return _make_ready(function)


def _launch_anew(executor: Any, *args: Any, **words: Any) -> None:
    _ready.clear()
    _launch(executor, *args, **words)


def install() -> None:
    """For all launches of this process."""
    interpreter._patch_lang = _make_ready_once
    interpreter.GridExecutor.__call__ = _launch_anew
