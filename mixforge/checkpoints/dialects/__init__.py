"""How each class of checkpoint says its architecture: every file of this folder, by the model types that it reads."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from mixforge.checkpoints.config import Config
from mixforge.checkpoints.draft import Draft, Tensors

Convert = Callable[[Config, Tensors], Draft]


def _read_folder() -> dict[str, Convert]:
    found: dict[str, Convert] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{name}")
        for model_type, convert in module.MODEL_TYPES.items():
            if model_type in found:
                raise TypeError(f"{module.__name__} reads {model_type}, which another dialect reads too")
            found[model_type] = convert
    return found


DIALECTS: dict[str, Convert] = _read_folder()
"""`model_type` of config.json to the function that reads it."""
