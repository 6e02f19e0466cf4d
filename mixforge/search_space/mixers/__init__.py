"""The catalogue: every mixer of this folder under its name, which is its file's name."""

from __future__ import annotations

import importlib
import pkgutil

from mixforge.search_space.mixer import Mixer


def _mixer_of(name: str) -> type[Mixer]:
    module = importlib.import_module(f"{__name__}.{name}")
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Mixer) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise TypeError(f"{module.__name__} defines {len(own)} mixers; a mixer's file defines exactly one")
    return own[0]


CATALOGUE: dict[str, type[Mixer]] = {
    name: _mixer_of(name) for name in sorted(module.name for module in pkgutil.iter_modules(__path__))
}
