"""Launches and bytes of our kernels beside fla-core's. Nothing runs: no GPU is needed.

    .venv-oracle/bin/python benchmarks/traffic.py [--json FILE] [--only PATTERN]

Each form that `kernels.py` times runs on meta tensors, as on a Hopper GPU, with its kernels written down instead of
launched: those of Triton, and PyTorch's between them. "Forward" is without gradients and with the last state, as for a
prompt; "both" is forward and backward, as in training. A launch moves each tensor that it is given once and as a whole.
"Tuned" are the configurations that Triton's tuner compiles and times on the way, of kernels that no row above has met;
ours come from a table. Without fla-core, or under Triton's interpreter, the exit status is 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from on_gpu.cases import Case, cases
from on_gpu.rivals import fla_version
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

import mixforge.kernels
from mixforge.evaluator.environment import environment
from mixforge.kernels.launch import interpreting, recording

OURS = "triton"
GENERATION, TARGET = "sm_90", GPUTarget("cuda", 90, 32)
# What of an H200 is asked for before a launch.
PROPERTIES = {
    "max_shared_mem": 232_448,
    "max_num_regs": 65_536,
    "multiprocessor_count": 132,
    "warpSize": 32,
    "sm_clock_rate": 1_980_000,
    "mem_clock_rate": 3_201_000,
    "mem_bus_width": 6_144,
}
# Of PyTorch's operations, those that only set memory aside or, beside the views, look at it in another way.
FREE = ("empty", "new_empty", "_unsafe_view")


@dataclass(slots=True)
class Pass:
    """What is launched by one call."""

    triton: int = 0
    torch: int = 0
    bytes: int = 0
    tuned: int = 0
    names: list[str] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return self.triton + self.torch

    def add(self, name: str, tensors: Sequence[Tensor], is_torch: bool = False) -> None:
        self.triton, self.torch = self.triton + (not is_torch), self.torch + is_torch
        self.bytes += sum(extent(each) for each in {id(each): each for each in tensors}.values())
        self.names.append(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One form of one case."""

    op: str
    variant: str
    size: str
    form: str
    forward: Pass
    """Without gradients."""
    both: Pass | None
    """Forward and backward; None of a step."""


class Driver:
    """As much of a driver of Triton as is asked before a launch. It launches nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(get_device_properties=lambda device=0: dict(PROPERTIES))

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class Between(TorchDispatchMode):
    """Writes down PyTorch's launches: operations that read or write memory of their own."""

    def __init__(self, made: Pass) -> None:
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mixforge":
            with self:
                return OPDEFS[func.name().partition(".")[0]]._init_fn(*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(FREE):
            self._made.add(f"aten.{name}", list(tensors([*args, kwargs or {}, made])), is_torch=True)
        return made


def tensors(values: Any) -> Iterator[Tensor]:
    """Those in lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors(value)


def extent(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded dimension are there once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


@contextmanager
def written_down() -> Generator[list[Pass]]:
    """Let what Triton would launch be added to the last of the passes, as on a GPU of `TARGET`."""
    passes = [Pass()]
    tuned: set[tuple[Any, ...]] = set()

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        passes[-1].add(self.fn.__name__, list(tensors([*args, kwargs])))

    def tune(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        choice = self.prune_configs(kwargs)
        given = {**self.nargs, **kwargs}
        kinds = [str(each.dtype) for each in given.values() if isinstance(each, Tensor)]
        asked = (id(self), *(str(given.get(key)) for key in self.keys), *kinds)
        if asked not in tuned:
            tuned.add(asked)
            passes[-1].tuned += len(choice) if len(choice) > 1 else 0
        return self.fn.run(*args, **{**kwargs, **choice[0].all_kwargs()})

    said = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "NVIDIA H200",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            major=9,
            minor=0,
            name="NVIDIA H200",
            multi_processor_count=132,
            shared_memory_per_block_optin=PROPERTIES["max_shared_mem"],
        ),
    }
    triton.runtime.driver.set_active(Driver())
    with (
        patch.multiple(torch.cuda, **said),
        patch.object(JITFunction, "run", run),
        patch.object(Autotuner, "run", tune),
    ):
        yield passes


def record(case: Case, form: str, passes: list[Pass]) -> Row:
    """One form without gradients and, unless it is a step, forward and backward."""
    inputs = case.draw(case.size, torch.device("meta"), torch.bfloat16)

    def passed(run: Callable[[], object]) -> Pass:
        passes.append(Pass())
        with recording(GENERATION) as ours, Between(passes[-1]):
            run()
        for launch in ours.launches:
            passes[-1].add(launch.name, list(tensors(launch.args)))
        return passes[-1]

    def train() -> None:
        output = next(tensors(case.forms[form](*inputs)))
        leaves = [each for each in inputs if each is not None and each.requires_grad]
        torch.autograd.grad(output, leaves, output.detach())

    with torch.no_grad():
        forward = passed(lambda: case.forms[form](*inputs))
    both = None if case.is_step else passed(train)
    where = {"op": case.op, "variant": case.variant, "size": case.size.text}
    return Row(**where, form=form, forward=forward, both=both)


def line(row: Row) -> str:
    """As people read it: launches of Triton and of PyTorch, megabytes and candidates, forward and both."""
    name = f"{row.op} ({row.variant})" if row.variant else row.op
    text = f"{name:<24}{row.size:<22}{row.form:<36}"
    for made in (row.forward, row.both):
        if made is not None:
            text += f"{made.triton:6} +{made.torch:2}{made.bytes / 1e6:10.2f}{made.tuned:6}"
    return text


HEADING = f"{'operation':<24}{'size':<22}{'form':<36}" + f"{'launches':>10}{'MB':>9}{'tuned':>6}" * 2


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Launches and bytes of fla over ours; of several of its forms the one that moves least."""
    lines = []
    for row in rows:
        rivals = [one for one in rows if place(one) == place(row) and one.form != row.form]
        if row.form != OURS or not rivals:
            continue
        for name in ("forward", "both") if row.both else ("forward",):
            made = getattr(row, name)
            best = min(rivals, key=lambda one: getattr(one, name).bytes)
            theirs = getattr(best, name)
            moved = theirs.bytes / made.bytes
            is_less = moved >= 1 and theirs.launches >= made.launches
            said = (
                f"{'less' if is_less else 'MORE'} {row.op} {row.variant} {row.size} {name}: {best.form} moves"
            )
            launches = f"in {theirs.launches} launches for {made.launches}"
            lines.append(f"{said} {moved:.2f} times the bytes of ours, {launches}")
    return lines


def place(row: Row) -> tuple[str, str, str]:
    """Rows of one place are forms of the same."""
    return row.op, row.variant, row.size


def is_timed(form: str) -> bool:
    """Ours and fla's; PyTorch's own are none of either."""
    return form == OURS or form.startswith("fla ")


def asked_for(words: str | None) -> argparse.Namespace:
    """What the command line asks for: `json`, a file, and `only`, a pattern. `words` describes the script."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="cases in whose label this regular expression is found"
    )
    asked = parser.parse_args()
    try:
        re.compile(asked.only)
    except re.error as error:
        parser.error(
            f"--only {asked.only!r} is no regular expression: {error}; give a part of a case's label"
        )
    # Before what takes long, not after it.
    if asked.json is not None and not asked.json.resolve().parent.is_dir():
        parser.error(f"--json {str(asked.json)!r} lies in no folder; make that first")
    return asked


def main() -> int:
    asked = asked_for(__doc__)
    if fla_version() is None or interpreting():
        said = "needs fla-core, which `make fla` brings to .venv-oracle, and no TRITON_INTERPRET"
        print(f"benchmarks/traffic.py {said}", file=sys.stderr)
        return 2
    for module in pkgutil.iter_modules(mixforge.kernels.__path__):
        importlib.import_module(f"mixforge.kernels.{module.name}")
    chosen = [
        case
        for case in cases(False)
        if re.search(asked.only, case.label) and any(is_timed(form) for form in case.forms if form != OURS)
    ]
    if not chosen:
        print(f"no case that fla-core has too is found by {asked.only!r}", file=sys.stderr)
        return 2
    print(HEADING)
    rows: list[Row] = []
    with written_down() as passes:
        for case in chosen:
            for form in filter(is_timed, case.forms):
                rows.append(record(case, form, passes))
                print(line(rows[-1]), flush=True)
    print("\n".join(verdicts(rows)))
    if asked.json is not None:
        made = {
            "command": " ".join(["python", *sys.argv]),
            "environment": asdict(environment("cpu")),
            "fla_core": fla_version(),
            "generation": GENERATION,
            "dtype": "bfloat16",
            "rows": [asdict(row) for row in rows],
            "verdicts": verdicts(rows),
        }
        asked.json.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
