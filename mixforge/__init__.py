"""Mixforge searches for the best sequence-model architecture for the hardware you have.

`mixforge.parse(text)` gives an architecture, `mixforge.open(url)` what a search has found. Loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixforge.db.results import open as open
    from mixforge.search_space.architecture import Architecture as Architecture
    from mixforge.search_space.notation import parse as parse
    from mixforge.search_space.presets import preset as preset

__version__ = "0.1.0"
__all__ = ["Architecture", "open", "parse", "preset"]

_HOMES = {
    "Architecture": "mixforge.search_space.architecture",
    "open": "mixforge.db.results",
    "parse": "mixforge.search_space.notation",
    "preset": "mixforge.search_space.presets",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mixforge' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
