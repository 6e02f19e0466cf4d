"""The tasks by name: each module of this folder defines one `Task`, and its name is the module's."""

from __future__ import annotations

import importlib
import pkgutil

from mixforge.evaluator.task import Task


def _listing() -> dict[str, type[Task]]:
    tasks: dict[str, type[Task]] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{name}")
        (tasks[name],) = (
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
        )
    return tasks


TASKS: dict[str, type[Task]] = _listing()
