"""Tests against the recurrences of fla-core, run by `make oracle` in an environment of its own.

Without fla-core nothing here is collected. With TRITON_INTERPRET=1 the Triton forms are compared, without it the others.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

collect_ignore_glob = []
if importlib.util.find_spec("fla") is None:
    collect_ignore_glob.append("test_*.py")
else:
    with warnings.catch_warnings():
        # It says that there is no GPU.
        warnings.simplefilter("ignore")
        import fla.ops  # noqa: F401
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreting

        interpreting.install()
