"""The check of an exported folder, run as a script in a process of its own that cannot import this package.

    python -I -B check.py THREADS FOLDER EVIDENCE [FOLDER EVIDENCE ...]

EVIDENCE is a safetensors file with `tokens_BT` and the searched model's `logits_BTX` on them. For each folder
one line of JSON goes to standard output: the largest absolute differences in float32 logits of
    searched     the exported model against the searched one,
    step         token-by-token decoding against one pass, behind the prefix if there is one,
    resumed      prefill of the first half, then steps, against one pass,
    future       the first half's logits when the second half's tokens are others.
The first half holds at least the prefix.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Protocol

import safetensors.torch
import torch
from torch import Tensor


class Model(Protocol):
    """What the check needs of an exported model. A state is the model's own affair."""

    prefix: int

    def __call__(self, tokens_BT: Tensor) -> Tensor: ...

    def prefill(self, tokens_BT: Tensor, *, capacity: int) -> tuple[Tensor, object]: ...

    def step(self, token_B: Tensor, state: object) -> tuple[Tensor, object]: ...


def check(model: Model, tokens_BT: Tensor, logits_BTX: Tensor) -> dict[str, float]:
    """The largest differences, by the names above."""
    first = max(1, model.prefix)
    half = max(first, tokens_BT.shape[1] // 2)
    with torch.no_grad():
        seen_BTX = model(tokens_BT)
        others_BT = tokens_BT.clone()
        others_BT[:, half:] = (others_BT[:, half:] + 1) % logits_BTX.shape[-1]
        return {
            "searched": _largest(seen_BTX, logits_BTX),
            "step": _largest(_decoded(model, tokens_BT, first), seen_BTX[:, first - 1 :]),
            "resumed": _largest(_decoded(model, tokens_BT, half), seen_BTX[:, half - 1 :]),
            "future": _largest(model(others_BT)[:, :half], seen_BTX[:, :half]),
        }


def _decoded(model: Model, tokens_BT: Tensor, prompt: int) -> Tensor:
    """Logits of the last token of the prompt and of every token after it, which are taken one at a time."""
    logits_BX, state = model.prefill(tokens_BT[:, :prompt], capacity=tokens_BT.shape[1])
    out = [logits_BX]
    for token_B in tokens_BT[:, prompt:].unbind(1):
        logits_BX, state = model.step(token_B, state)
        out.append(logits_BX.clone())
    return torch.stack(out, 1)


def _largest(one: Tensor, other: Tensor) -> float:
    # A NaN must not pass as a small difference.
    return float((one - other).abs().nan_to_num(nan=float("inf")).max())


def _module(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(threads: str, *given: str) -> None:
    # From here on `import mixforge` raises, wherever the package is installed.
    sys.modules["mixforge"] = None  # type: ignore[assignment]
    torch.set_num_threads(int(threads))
    for folder, evidence in zip(given[::2], given[1::2], strict=True):
        seen = safetensors.torch.load_file(evidence)
        differences = check(_module(Path(folder)).load(folder), seen["tokens_BT"], seen["logits_BTX"])
        sys.stdout.write(json.dumps(differences) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
