"""How long a person waits for the command line: `--help`, and `front` and `query` on 10,000 stored trials.

    python benchmarks/commands.py [--trials N] [--json FILE]

Whole processes, Python's start included, on the clock and in processor time. The trials are synthetic (their figures
are drawn, and nothing was trained): what is timed is reading them. Goals: help under 0.4 s, a front under 1 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixforge.db.store import Store
from mixforge.db.values import Choice, Proposal, StoredArchitecture
from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluation import (
    PHASES,
    Curve,
    Environment,
    Evaluation,
    Outcome,
    Profile,
    Timing,
    Workload,
)

CAMPAIGN = 'name = "synthetic"\nobjectives = ["bits_per_byte", "recall", "decode_ms"]\n'
GOALS_S = {"--help": 0.4, "front": 1.0}
REPEATS = 7


def fill(path: Path, trials: int) -> None:
    """Store synthetic trials with 25 choices, a curve of 100 points and 100 raw repeats a phase."""
    rng = random.Random(0)
    where = environment("cpu")
    with Store.open(path, "create") as store:
        campaign = store.add_campaign("synthetic", "0" * 64, CAMPAIGN, 0)
        for number in range(trials):
            architecture = StoredArchitecture(
                digest=f"{rng.getrandbits(256):064x}",
                text=f"lm({number} * (attn + swiglu), width=64)",
                canonical=f'{{"units":[{number}]}}',
                width=64,
                depth=2 * number,
                mixers=("attn", "swiglu"),
            )
            choices = tuple(
                Choice(name=f"choice[{i}]", index=i % 3, option="gdn", options=3) for i in range(25)
            )
            trial = store.propose(
                campaign,
                Proposal(
                    number=number, architecture=architecture, budget="0" * 64, origin="tpe", choices=choices
                ),
            )
            cost = rng.random()
            token = store.claim(trial, "train", "worker")
            store.record_evaluation(token, evaluation(rng, cost, where), seconds=1.0)
            token = store.claim(trial, "profile", "worker")
            store.record_profile(token, profile(rng, cost, where), seconds=1.0)


def evaluation(rng: random.Random, cost: float, where: Environment) -> Evaluation:
    """Scores that get better with a cost, with noise."""
    return Evaluation(
        outcome=Outcome.ok,
        context=2048,
        params=int(1e5 + 1e6 * cost),
        flops=10**9,
        state_bytes=10**5,
        decode_bytes=10**6,
        bits_per_byte=4 - 2 * cost + rng.gauss(0, 0.2),
        recall=min(1.0, max(0.0, cost + rng.gauss(0, 0.2))),
        curves=(Curve(task="text", steps=tuple(range(100)), loss=tuple(rng.random() for _ in range(100))),),
        backend="torch",
        seed=0,
        environment=where,
    )


def profile(rng: random.Random, cost: float, where: Environment) -> Profile:
    """Latencies that grow with a cost, with noise."""
    return Profile(
        outcome=Outcome.ok,
        workload=Workload(),
        timings=tuple(
            Timing(phase=phase, raw_ms=tuple(1 + cost + rng.random() / 10 for _ in range(100)))
            for phase in PHASES
        ),
        peak_bytes=10**7,
        backend="torch",
        environment=where,
    )


def seconds(words: list[str]) -> tuple[float, float]:
    """One run of a command: by the clock, and processor time of the process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "mixforge.cli.main", *words], capture_output=True, text=True)
    passed = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0 or not done.stdout:
        sys.exit(f"mixforge {' '.join(words)} failed, so nothing is timed:\n{done.stderr}")
    return passed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "mixforge.db"
        fill(database, arguments.trials)
        commands = {
            "--help": ["--help"],
            "front": ["front", "--db", str(database)],
            "query": ["query", "--where", "bits_per_byte < 2.2 and decode_ms < 1.5", "--db", str(database)],
            "status": ["status", "--db", str(database)],
        }
        taken = {name: [seconds(words) for _ in range(REPEATS)] for name, words in commands.items()}
    where = environment("cpu")
    print(f"{where.device}, load {os.getloadavg()[0]:.1f}; {arguments.trials} trials; medians of {REPEATS}")
    print(f"{'mixforge':<10}{'clock s':>10}{'cpu s':>10}{'goal s':>10}")
    found = {}
    for name, repeats in taken.items():
        clock, processor = (statistics.median(each) for each in zip(*repeats, strict=True))
        goal = GOALS_S.get(name)
        print(f"{name:<10}{clock:>10.2f}{processor:>10.2f}{goal or '-':>10}")
        found[name] = {"clock_s": clock, "cpu_s": processor, "goal_s": goal, "raw": repeats}
    if arguments.json is not None:
        record = {
            "device": where.device,
            "python": where.python,
            "commit": where.commit,
            "trials": arguments.trials,
        }
        arguments.json.write_text(json.dumps({**record, "commands": found}, indent=2) + "\n")
    missed = [name for name, goal in GOALS_S.items() if found[name]["clock_s"] > goal]
    sys.exit(f"goal missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
