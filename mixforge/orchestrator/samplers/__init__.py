"""The samplers: each module of this folder is one, under its own name, with `build` and a line `ABOUT` it.

`build(seed, trials, before)` gives the sampler for one proposal. It knows nothing but its seed and the study;
`before` is the one of the proposal before, from which it may carry over what merely saves time.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

AUTO = "auto"

SAMPLERS: dict[str, ModuleType] = {
    found.name: importlib.import_module(f"{__name__}.{found.name}")
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name)
}

# TPE leads up to some 300 trials, and its proposals cost 25 ms at 500 and 65 ms at 1,000; NSGA-II's cost 1
# ms.
_TPE_UP_TO = 500


def sampler_for(trials: int | None) -> str:
    """The sampler that suits a budget of so many trials (None: as many as the hours allow)."""
    return "tpe" if trials is not None and trials <= _TPE_UP_TO else "nsga2"
