"""Products of float32 by oneDNN against torch's own, on one thread, and what that makes of training steps.

    python benchmarks/dense.py [--json FILE] [--repeats 21]

Each repeat runs both after one another, and whoever comes first changes, so that what else the machine does falls on
both; a figure is the median over the repeats of the process's processor time, a ratio that of the pairs. Exit status 1
where the two differ, 2 where this processor's products stay with torch: nothing is timed then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.evaluator.environment import environment
from mixforge.kernels import dense as module
from mixforge.kernels.dense import dense, onednn_product
from mixforge.search_space.presets import preset

# Rows, inputs, outputs.
SHAPES = [
    (1024, 64, 64),
    (1024, 64, 192),
    (1024, 96, 64),
    (64, 256, 256),
    (32, 512, 512),
    (4096, 128, 512),
    (4096, 256, 1024),
]
STEPS = ["transformer_gqa", "gdn", "mamba2", "rwkv7"]
BOUND = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Milliseconds; `both` is forward and backward, and a ratio says how many times as fast oneDNN is."""

    name: str
    theirs_forward_ms: float
    ours_forward_ms: float
    forward_ratio: float
    theirs_both_ms: float
    ours_both_ms: float
    both_ratio: float
    both_quartiles: tuple[float, float]


def in_turns(
    theirs: Callable[[], object], ours: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each repeat, behind one that is not counted. Short work is repeated within."""
    start = time.process_time()
    theirs()
    ours()
    times = max(1, round(0.01 / (time.process_time() - start)))
    taken: tuple[list[float], list[float]] = [], []
    for repeat in range(repeats):
        for who in (0, 1) if repeat % 2 else (1, 0):
            start = time.process_time()
            for _ in range(times):
                (theirs, ours)[who]()
            taken[who].append(1e3 * (time.process_time() - start) / times)
    return taken


def row(
    name: str, forward: list[Callable[[], object]], both: list[Callable[[], object]], repeats: int
) -> Row:
    theirs, ours = in_turns(forward[0], forward[1], repeats)
    theirs_both, ours_both = in_turns(both[0], both[1], repeats)
    ratios = [a / b for a, b in zip(theirs_both, ours_both, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Row(
        name=name,
        theirs_forward_ms=statistics.median(theirs),
        ours_forward_ms=statistics.median(ours),
        forward_ratio=statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
        theirs_both_ms=statistics.median(theirs_both),
        ours_both_ms=statistics.median(ours_both),
        both_ratio=middle,
        both_quartiles=(low, high),
    )


def of_shape(rows: int, inputs: int, outputs: int, repeats: int) -> Row:
    x, weight = (
        torch.randn(rows, inputs, requires_grad=True),
        torch.randn(outputs, inputs, requires_grad=True),
    )
    dy = torch.randn(rows, outputs)

    def forward(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return product(x, weight)

    def both(product: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(product(x, weight), (x, weight), dy)

    for ours, theirs in zip(both(dense), both(F.linear), strict=True):
        check(ours, theirs)
    forwards: list[Callable[[], object]] = [lambda: forward(F.linear), lambda: forward(dense)]
    boths: list[Callable[[], object]] = [lambda: both(F.linear), lambda: both(dense)]
    return row(f"{rows} x {inputs} x {outputs}", forwards, boths, repeats)


def of_step(name: str, repeats: int) -> Row:
    """A model of the preset's small size on 4 sequences of 256 tokens."""
    model = preset(name, "small").build().train()
    tokens_BT = torch.randint(0, model.vocab, (4, 257))

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(tokens_BT[:, :-1])
            return logits

    def both() -> None:
        model.zero_grad()
        F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()

    def by_torch(work: Callable[[], object]) -> object:
        least, module.LEAST = module.LEAST, sys.maxsize
        try:
            return work()
        finally:
            module.LEAST = least

    expected = by_torch(forward)
    assert isinstance(expected, Tensor)
    check(forward(), expected)
    forwards: list[Callable[[], object]] = [lambda: by_torch(forward), forward]
    boths: list[Callable[[], object]] = [lambda: by_torch(both), both]
    return row(f"{name}, {millions(model)}", forwards, boths, max(5, repeats // 3))


def millions(model: nn.Module) -> str:
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M"


def check(ours: Tensor, theirs: Tensor) -> None:
    error = float((ours - theirs).detach().norm() / theirs.detach().norm())
    if not error < BOUND:
        raise SystemExit(f"the two differ by {error:.1e}, over {BOUND:.0e}; nothing is reported")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if onednn_product() is None:
        print("on this processor products stay with torch: nothing to compare", file=sys.stderr)
        return 2
    here = environment("cpu")
    print(f"{here.device}, one thread, torch {torch.__version__}, float32")
    print("                             forward, ms                  forward + backward, ms")
    print("                             torch    oneDNN  ratio       torch    oneDNN  ratio  quartiles")
    found = []
    for shape in SHAPES:
        found.append(of_shape(*shape, asked.repeats))
        show(found[-1])
    for name in STEPS:
        found.append(of_step(name, asked.repeats))
        show(found[-1])
    if asked.json is not None:
        record = {
            "environment": asdict(here),
            "rows": [asdict(each) for each in found],
        }
        asked.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def show(each: Row) -> None:
    low, high = each.both_quartiles
    print(
        f"{each.name:24}{each.theirs_forward_ms:10.3f}{each.ours_forward_ms:10.3f}{each.forward_ratio:7.2f}"
        f"{each.theirs_both_ms:12.3f}{each.ours_both_ms:10.3f}{each.both_ratio:7.2f}  ({low:.2f}-{high:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
