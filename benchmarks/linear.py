"""The linear family in chunks against the loop over tokens, forward and with backward, on one thread.

    python benchmarks/linear.py [--json FILE] [--repeats 7] [--batch 16] [--length 512] [--heads 4] [--dim 32]
    python benchmarks/linear.py --against COMMIT [...]      the chunks of an earlier commit in place of the loop

Each repeat runs the loop and the chunks after one another for every decay and rule, so that what else the machine
does falls on both; a figure is the median over the repeats, with the quartiles, of the process's processor time.
Exit status 1 where the chunks are not equal to the loop in these very shapes: nothing is timed then.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from mixforge.evaluator.environment import environment
from mixforge.kernels.chunked_linear import FORMS, form

DECAYS = ("none", "head", "scalar", "channel")
RULES = ("add", "delta")
# Relative error of float32 against the loop in float64; a head's one decay is a sum of terms that cancel.
BOUND, HEAD_BOUND = 1e-5, 1e-3
# What is asked of the ratio loop / chunks, forward and backward.
GOAL, PLAIN_GOAL = 3.0, 5.0
# What was asked of the chunks of 8e534fc / those that followed them, with the delta rule or a decay per channel.
AGAINST_GOAL = 1.3

Inputs = list[Tensor | None]
Operation = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of one form and one phase."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    repeats_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One member of the family; `forward` is without gradients, `both` is forward and backward.

    `before` is what the chunks are held against, the loop or the chunks of an earlier commit.
    """

    decay: str
    rule: str
    worst_error: float
    before_forward: Timing
    chunked_forward: Timing
    before_both: Timing
    chunked_both: Timing
    forward_ratio: float
    both_ratio: float
    goal: float | None


def draw(decay: str, rule: str, batch: int, length: int, heads: int, dim: int) -> Inputs:
    dice = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(batch, length, heads, dim, generator=dice)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=dice)

    q, k, v = normal() * dim**-0.5, torch.nn.functional.normalize(normal(), dim=-1), normal()
    g = {
        "none": None,
        "head": -0.1 * uniform(heads),
        "scalar": -uniform(batch, length, heads),
        "channel": -5 * uniform(batch, length, heads, dim) ** 4,
    }[decay]
    beta = uniform(batch, length, heads) if rule == "delta" else None
    return [None if x is None else x.requires_grad_() for x in (q, k, v, g, beta)]


def worst_error(chunked: Operation, inputs: Inputs, do: Tensor) -> dict[str, float]:
    """Relative error of output and gradients against the loop in float64."""
    exact: Inputs = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    found, expected = gradients(chunked, inputs, do), gradients(FORMS["reference"], exact, do.double())
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


def gradients(operation: Operation, inputs: Inputs, do: Tensor) -> dict[str, Tensor]:
    o, _ = operation(*inputs, None)
    names = [name for name, x in zip("qkvgb", inputs, strict=True) if x is not None]
    grads = torch.autograd.grad(o, [x for x in inputs if x is not None], do)
    return {"o": o.detach(), **dict(zip(names, grads, strict=True))}


def milliseconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def timing(repeats: list[float]) -> Timing:
    low, _, high = statistics.quantiles(repeats, n=4)
    return Timing(median_ms=statistics.median(repeats), quartiles_ms=(low, high), repeats_ms=tuple(repeats))


def earlier(commit: str) -> Callable[[str, str, str], Operation]:
    """`form` as it was at a commit, whose kernels are imported from a folder of their own."""
    root = Path(__file__).parent.parent
    command = ["git", "archive", commit, "mixforge/__init__.py", "mixforge/kernels"]
    archive = subprocess.run(command, capture_output=True, check=True, cwd=root)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "mixforge"}
        sys.path.insert(0, folder)
        found: Callable[[str, str, str], Operation] = importlib.import_module(form.__module__).form
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "mixforge"]:
            del sys.modules[name]
        sys.modules.update(own)
    return found


def measure(decay: str, rule: str, repeats: int, shape: tuple[int, int, int, int], before: Operation) -> Row:
    inputs = draw(decay, rule, *shape)
    batch, length, heads, dim = shape
    do = torch.randn(batch, length, heads, dim, generator=torch.Generator().manual_seed(1))
    forms = {"before": before, "chunked": form("torch", rule, decay)}
    errors = worst_error(forms["chunked"], inputs, do)
    for name, error in errors.items():
        bound = HEAD_BOUND if (name, decay) == ("g", "head") else BOUND
        if not error < bound:
            raise SystemExit(
                f"{decay}, {rule}: {name} is off by {error:.1e}, over {bound:.0e}; nothing was timed"
            )
    found: dict[tuple[str, str], list[float]] = {key: [] for key in product(forms, ("forward", "both"))}
    for repeat in range(repeats + 1):
        for name, operation in forms.items():
            with torch.no_grad():
                forward = milliseconds(lambda run=operation: run(*inputs, None))
            both = milliseconds(lambda run=operation: gradients(run, inputs, do))
            # The first round warms caches and allocators.
            if repeat > 0:
                found[name, "forward"].append(forward)
                found[name, "both"].append(both)
    times = {key: timing(values) for key, values in found.items()}
    if before is FORMS["reference"]:
        goal = PLAIN_GOAL if (decay, rule) == ("none", "add") else GOAL
    else:
        goal = AGAINST_GOAL if rule == "delta" or decay == "channel" else None
    return Row(
        decay=decay,
        rule=rule,
        worst_error=max(errors.values()),
        before_forward=times["before", "forward"],
        chunked_forward=times["chunked", "forward"],
        before_both=times["before", "both"],
        chunked_both=times["chunked", "both"],
        forward_ratio=times["before", "forward"].median_ms / times["chunked", "forward"].median_ms,
        both_ratio=times["before", "both"].median_ms / times["chunked", "both"].median_ms,
        goal=goal,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures, with every repeat, to this file")
    parser.add_argument("--against", metavar="COMMIT", help="hold the chunks against those of this commit")
    for name, default in (("repeats", 7), ("batch", 16), ("length", 512), ("heads", 4), ("dim", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    here = environment("cpu")
    shape = (asked.batch, asked.length, asked.heads, asked.dim)
    print(f"{here.device}, one thread, torch {here.torch}, float32, B={shape[0]} T={shape[1]}", end=" ")
    print(f"H={shape[2]} D={shape[3]}, median of {asked.repeats} interleaved repeats")
    past = None if asked.against is None else earlier(asked.against)
    name = "loop" if asked.against is None else asked.against[:7]
    print("                  forward, ms                forward + backward, ms           relative")
    print(f"decay   rule  {name:>8}  chunked  ratio   {name:>8}  chunked  ratio  goal        error")
    rows = []
    for decay, rule in product(DECAYS, RULES):
        before = FORMS["reference"] if past is None else past("torch", rule, decay)
        row = measure(decay, rule, asked.repeats, shape, before)
        rows.append(row)
        verdict = "   -     "
        if row.goal is not None:
            verdict = f"{row.goal:4.1f} {'ok  ' if row.both_ratio >= row.goal else 'MISS'}"
        print(
            f"{decay:8}{rule:6}{row.before_forward.median_ms:8.1f}{row.chunked_forward.median_ms:9.1f}"
            f"{row.forward_ratio:7.2f}{row.before_both.median_ms:11.1f}{row.chunked_both.median_ms:9.1f}"
            f"{row.both_ratio:7.2f}  {verdict}{row.worst_error:10.1e}",
            flush=True,
        )
    if asked.json is not None:
        record = {
            "command": " ".join(sys.argv),
            "against": "loop" if asked.against is None else asked.against,
            "environment": asdict(here),
            "dtype": "float32",
            "shape": dict(zip(("batch", "length", "heads", "dim"), shape, strict=True)),
            "rows": [asdict(row) for row in rows],
        }
        asked.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
