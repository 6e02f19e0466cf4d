"""Which kernel of ours takes the time: each operation's kernels on a GPU, forward and backward, by torch's profiler.

    python benchmarks/stages.py [--json FILE] [--size 8x4096x16x128] [--only TEXT]

bfloat16; sizes are batch x length x heads x channels of a head. A figure is the mean of five passes after three that are
not counted, without the gaps between launches: `kernels.py` has the time of an operation as a whole. Without a GPU the
exit status is 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from on_gpu.cases import Case, Size, sequences
from on_gpu.measuring import first_line, outputs_of
from torch.profiler import ProfilerActivity, profile

from mixforge.evaluator.environment import environment

WARM, PASSES = 3, 5
SIZES = ("8x4096x16x128", "64x256x4x32")


def passes(case: Case) -> Callable[[], object]:
    """One pass forward and backward of our form, the output taken as its own gradient."""
    torch.manual_seed(0)
    inputs = case.draw(case.size, torch.device("cuda"), torch.bfloat16)
    leaves = [x for x in inputs if x is not None and x.requires_grad]

    def run() -> object:
        output = outputs_of(case.forms["triton"], inputs)[0]
        return torch.autograd.grad(output, leaves, output.detach())

    return run


def kernel_us(run: Callable[[], object]) -> dict[str, float]:
    """Microseconds of a pass in each kernel, the longest first."""
    for _ in range(WARM):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PASSES):
            run()
        torch.cuda.synchronize()
    total: Counter[str] = Counter()
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name] += event.device_time
    return {name: us / PASSES for name, us in total.most_common()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--size", action="append", help=f"default: {' and '.join(SIZES)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose label contains this text")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/stages.py times kernels on a GPU, and torch sees none here", file=sys.stderr)
        return 2
    where = environment("cuda")
    print(f"{where.device}, torch {where.torch}, Triton {where.triton}, commit {where.commit}, bfloat16")
    rows = []
    for text in asked.size or SIZES:
        batch, length, heads, dim = map(int, text.split("x"))
        for case in sequences(Size(batch, length, heads, dim)):
            if "triton" not in case.forms or asked.only not in case.label:
                continue
            try:
                found = kernel_us(passes(case))
            except Exception as error:
                print(f"\n{case.label}: {first_line(error)}")
                continue
            rows.append({"operation": case.label, "kernels_us": found})
            print(f"\n{case.label}: {sum(found.values()):.0f} us")
            for name, us in found.items():
                print(f"{us:12.1f} us  {name[:90]}")
            torch.cuda.empty_cache()
            if asked.json is not None:
                # After each, so that what was measured is kept if the next is interrupted.
                record = {
                    "command": " ".join(["python", *sys.argv]),
                    "environment": asdict(where),
                    "rows": rows,
                }
                asked.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
