"""Overhead of the search loop: propose, claim, dispatch to Ray workers, record. Evaluation and profile are stubbed.

    python benchmarks/loop.py [--trials 1000] [--sampler nsga2] [--json FILE]

`overhead` is what the driver spends on a trial in those four. `wall` is a whole trial by the clock: also two round
trips to Ray's workers, waiting for the machine to be idle before a profile, and the outlook for the screen. Both are
taken over batches of trials, for the loop profiles them in batches. Goals: a median overhead under 25 ms a trial, and
flat from trial 100 to trial 1,000.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from ray import cloudpickle

from mixforge.db.store import Store
from mixforge.db.values import State, Trial
from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluation import Environment, Evaluation, Outcome, Profile, Timing
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.cluster import local_cluster
from mixforge.orchestrator.interruption import Interruption
from mixforge.orchestrator.ledger import Ledger
from mixforge.orchestrator.loop import Loop
from mixforge.orchestrator.pace import Pace
from mixforge.orchestrator.workers import Ended, Job, Report, Work, Workers

GOAL_MS = 25.0
# A second half that is dearer than this many times the first is not flat.
FLAT = 1.5
BATCH = 25
CAMPAIGN = Path(__file__).parents[1] / "examples" / "laptop.toml"


def stub(here: Environment) -> Work:
    """Work that answers at once, with figures that follow from the architecture."""

    def work(job: Job, device: str, report: Report) -> Evaluation | Profile:
        chance = int(job.architecture.digest[:6], 16) / 0xFFFFFF
        if job.stage == "profile":
            base = 0.02 * job.architecture.depth * (1 + chance / 4)
            raw_ms = tuple(base * (1 + repeat / 1000) for repeat in range(30))
            return Profile(
                outcome=Outcome.ok,
                workload=job.budget.workload,
                timings=tuple(Timing(phase=phase, raw_ms=raw_ms) for phase in ("prefill", "decode", "train")),
                peak_bytes=10_000_000,
                backend=job.budget.backend,
                environment=here,
            )
        size = job.architecture.depth * job.architecture.width
        return Evaluation(
            outcome=Outcome.ok,
            context=job.budget.context,
            params=size,
            flops=size,
            state_bytes=size,
            decode_bytes=size,
            bits_per_byte=2 + 100 / size + chance,
            bits_per_byte_test=3.0,
            recall=chance,
            recall_test=chance,
            train_tokens=1,
            train_s=0.0,
            backend=job.budget.backend,
            seed=job.budget.seed,
            environment=here,
        )

    return work


class Timed:
    """Seconds spent in each part of the loop, and when each trial was finished."""

    def __init__(self) -> None:
        self.parts_s: dict[str, list[tuple[float, float]]] = defaultdict(list)
        """For each call: when it ended, and how long it took."""
        self.finished: list[float] = []

    def around(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def timed(*given: object, **named: object) -> object:
            before = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                ended = time.perf_counter()
                self.parts_s[name].append((ended, ended - before))

        return timed


class Watched(Ledger):
    """A ledger that notes when a trial is finished."""

    finished: list[float]

    def record(self, number: int, ended: Ended) -> Trial:
        trial = super().record(number, ended)
        if trial.state is State.finished:
            self.finished.append(time.perf_counter())
        return trial


def measure(trials: int, sampler: str, workers: int) -> dict[str, object]:
    text = CAMPAIGN.read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("hours", "trials", "sampler"))]
    settings = ["[search]", f'sampler = "{sampler}"', f"trials = {trials}"]
    campaign = Campaign.parse("\n".join(lines).replace("[search]", "\n".join(settings)), str(CAMPAIGN))
    here = environment("cpu")
    timed = Timed()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.open(Path(folder) / "loop.db", "create") as store,
        local_cluster(workers) as short,
    ):
        ledger = Watched(campaign, store, here)
        ledger.finished = timed.finished
        pool = Workers(workers, folder=short, do=stub(here))
        while len(pool.idle()) < workers:
            pool.wait(0.1)
        pace = Pace(clock=time.monotonic, workers=workers, before_s=0.0, hours=None)
        for name in ("propose", "claim", "record"):
            setattr(ledger, name, timed.around(name, getattr(ledger, name)))
        pool.submit = timed.around("dispatch", pool.submit)  # type: ignore[method-assign]
        loop = Loop(campaign, store, ledger, pool, Interruption(), pace, watch=lambda progress: None)
        begun = time.perf_counter()
        ending = loop.run()
        pool.close()
    stamps = [begun, *timed.finished]
    windows = [(stamps[upto - BATCH], stamps[upto]) for upto in range(BATCH, len(stamps), BATCH)]
    wall = [1000 * (end - start) / BATCH for start, end in windows]
    calls = [call for part in timed.parts_s.values() for call in part]
    overhead = [
        1000 * sum(seconds for ended, seconds in calls if start < ended <= end) / BATCH
        for start, end in windows
    ]
    early, late = overhead[4:8], overhead[-4:]
    rejected = sum(ending.progress.rejected.values())
    return {
        "trials": ending.progress.trials_done,
        "sampler": sampler,
        "workers": workers,
        "device": here.device,
        "commit": here.commit,
        "median_ms": statistics.median(overhead),
        "wall_ms": statistics.median(wall),
        "early_ms": statistics.median(early),
        "late_ms": statistics.median(late),
        "batches_ms": overhead,
        "wall_batches_ms": wall,
        "parts_ms": {
            # A trial is claimed, dispatched and recorded twice: to train and to profile.
            name: 1000 * statistics.median(seconds for _, seconds in part) * (1 if name == "propose" else 2)
            for name, part in timed.parts_s.items()
        },
        "proposals_refused": rejected,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--sampler", default="nsga2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    found = measure(given.trials, given.sampler, given.workers)
    print(f"{found['trials']} trials, {found['sampler']}, {found['workers']} workers, {found['device']}")
    print(f"overhead, median     {found['median_ms']:7.2f} ms a trial   (goal: under {GOAL_MS:g})")
    print(f"  trials 100 to 200  {found['early_ms']:7.2f} ms")
    print(f"  the last 100       {found['late_ms']:7.2f} ms")
    for name, ms in found["parts_ms"].items():
        print(f"  {name:<18} {ms:7.2f} ms")
    print(f"wall, median         {found['wall_ms']:7.2f} ms a trial")
    print(f"proposals refused    {found['proposals_refused']}")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    flat = found["late_ms"] <= FLAT * found["early_ms"]
    return 0 if found["median_ms"] < GOAL_MS and flat else 1


if __name__ == "__main__":
    raise SystemExit(main())
