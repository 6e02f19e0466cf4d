"""How fast a search space yields candidates: drawn, checked, held against its limits, canonicalised and
digested.

    python benchmarks/space.py [CAMPAIGN.toml] [--json FILE]

One thread. Seconds are processor seconds, so that other work on the machine does not count; the rate by the
clock is given beside them. `draws` counts every sentence, `candidates` those that are legal and within the
limits. The first 2,000 sentences are given apart: they fill the caches of layers that later ones find.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import tomllib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from mixforge.evaluator.environment import environment
from mixforge.search_space.grammar import Rejection, Space

SENTENCES = 2_000
REPEATS = 9


def run(
    space: Space, rng: random.Random, rejected: Counter[str], digests: set[str]
) -> tuple[float, float, float]:
    """Over one lot: sentences and candidates a processor second, and sentences a second that passed."""
    candidates = 0
    start, passed = time.process_time(), time.perf_counter()
    for _ in range(SENTENCES):
        found = space.admit(space.draw(rng))
        if isinstance(found, Rejection):
            rejected[found.kind] += 1
        else:
            digests.add(found.digest)
            candidates += 1
    seconds, passed = time.process_time() - start, time.perf_counter() - passed
    return SENTENCES / seconds, candidates / seconds, SENTENCES / passed


def check(space: Space) -> None:
    """Refuse to time a space that does not hold its own words."""
    for seed in range(20):
        drawn = space.draw_legal(random.Random(seed))
        again = space.draw_legal(random.Random(seed))
        derivation = space.contains(drawn.architecture)
        if again.architecture.digest != drawn.architecture.digest:
            sys.exit("the same seed drew two architectures; nothing is timed")
        if derivation is None or derivation.architecture != drawn.architecture:
            sys.exit("the space does not contain what it drew; nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", nargs="?", default="examples/laptop.toml", type=Path)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    table = tomllib.loads(given.campaign.read_text())["space"]
    rejected: Counter[str] = Counter()
    digests: set[str] = set()
    rng = random.Random(0)
    space = Space.from_table(table)
    first_draws, first_candidates, _ = run(space, rng, rejected, digests)
    rates = [run(space, rng, rejected, digests) for _ in range(REPEATS)]
    check(space)
    draws = [draw for draw, _, _ in rates]
    candidates = [candidate for _, candidate, _ in rates]
    elapsed = [passed for _, _, passed in rates]
    here = environment("cpu")
    figures = {
        "command": " ".join(["python", *sys.argv]),
        "campaign": str(given.campaign),
        "environment": asdict(here),
        "sentences_in_space": str(space.count()),
        "first_draws_per_s": first_draws,
        "first_candidates_per_s": first_candidates,
        "draws_per_s": statistics.median(draws),
        "draws_per_s_all": draws,
        "candidates_per_s": statistics.median(candidates),
        "candidates_per_s_all": candidates,
        "draws_per_s_elapsed": statistics.median(elapsed),
        "distinct_seen": len(digests),
        "rejected": dict(rejected.most_common()),
    }
    print(f"{given.campaign} on one core of {here.device}, Python {here.python}")
    print(f"  sentences in the space    {space.count():>10,}")
    print(
        f"  first {SENTENCES:,} sentences     {first_draws:>10,.0f} draws/s "
        f"{first_candidates:>8,.0f} candidates/s"
    )
    print(
        f"  median of {REPEATS} lots          {statistics.median(draws):>10,.0f} draws/s "
        f"{statistics.median(candidates):>8,.0f} candidates/s"
        f"   ({min(draws):,.0f} to {max(draws):,.0f} draws/s; {statistics.median(elapsed):,.0f} elapsed)"
    )
    for kind, count in rejected.most_common():
        print(f"  rejected {count:>8,} x {kind}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
