"""Work that costs nothing and answers by the architecture alone, and faults to order.

A fault is a file in a folder: `kill-3` makes a worker that is given trial work die three times, one file
each.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluation import Evaluation, Outcome, Profile, Timing
from mixforge.orchestrator.board import Mark

CAMPAIGN = """
name = "tiny"
seed = 3
objectives = ["recall", "decode_ms"]
baselines = ["lm(attn + swiglu, width=32)", "lm(gdn + swiglu, width=32)"]

[space]
start = "lm(any(1, 2, 3) ** layer, width=any(16, 32, 48))"

[space.rules]
layer = "any(attn(window=any(none, 8)), gdn, mamba2, conv, rglru) + any(swiglu, mlp)"

[space.limits]
params = "<= 40e3"

[search]
sampler = "nsga2"
trials = 20

[evaluation]
context = 64
deadline_s = 5

[evaluation.workload]
context = 16

[tasks.mqar]
vocab = 16
length = 16
pairs = 2
examples = 64
[tasks.mqar.training]
steps = 4
batch = 8
lr = 3e-3
"""


def answer(job, outcome=Outcome.ok, reason=None):
    """The stub's evaluation or profile of a job: figures that follow from the digest and the size."""
    chance = int(job.architecture.digest[:6], 16) / 0xFFFFFF
    here = _environment()
    if job.stage == "profile":
        decode_ms = 0.01 * job.architecture.depth * job.architecture.width * (1 + chance / 10)
        timings = (Timing(phase="decode", raw_ms=(decode_ms, decode_ms * 1.01, decode_ms * 1.02)),)
        return Profile(
            outcome=outcome,
            reason=reason,
            workload=job.budget.workload,
            timings=timings,
            peak_bytes=1000,
            backend=job.budget.backend,
            environment=here,
        )
    cost = job.architecture.cost(job.budget.context)
    size = job.architecture.depth * job.architecture.width
    return Evaluation(
        outcome=outcome,
        reason=reason,
        context=job.budget.context,
        params=cost.params,
        flops=cost.flops,
        state_bytes=cost.state_bytes,
        decode_bytes=cost.decode_bytes,
        recall=(1 - 1 / (1 + size / 100) * (0.9 + chance / 5)) if outcome is Outcome.ok else None,
        recall_test=0.5 if outcome is Outcome.ok else None,
        train_tokens=10,
        train_s=0.01,
        backend=job.budget.backend,
        seed=job.budget.seed,
        environment=here,
    )


_HERE = []


def _environment():
    if not _HERE:
        _HERE.append(environment("cpu"))
    return _HERE[0]


def faulty(folder: Path, seconds: float = 0.0):
    """A worker's work that first looks for a fault, of the architecture's or of any, and takes one away."""

    def work(job, device, report):
        log = folder / "log"
        with log.open("a") as file:
            file.write(f"{job.stage} {job.architecture.digest} {os.getpid()} {time.monotonic()}\n")
        pause_s = seconds / 4
        for fault in sorted(folder.glob(f"{job.stage}-*")):
            _, kind, digest, _ = fault.name.split("-")
            if digest in ("any", job.architecture.digest[:8]):
                fault.unlink()
                pause_s = _suffer(kind) or pause_s
                break
        for step in range(4):
            time.sleep(pause_s)
            report(Mark(task=0, step=step + 1, steps=4, loss=1.0))
        return answer(job)

    return work


def _suffer(kind):
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(1e6)
        case "raise":
            raise RuntimeError("a worker that fails by itself")
        case "slow":
            return 0.1
    return None
