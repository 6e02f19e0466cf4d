"""Trains every architecture that the campaigns of this folder compare, with several seeds, and keeps the scores.

    OMP_NUM_THREADS=1 python examples/findings/run.py                     what is not there yet, of all campaigns
    OMP_NUM_THREADS=1 python examples/findings/run.py --only f15          of those whose name begins so
    OMP_NUM_THREADS=1 python examples/findings/run.py --seeds 5           with seeds 0 to 4

A campaign trains with its own seed; here each of its baselines is trained once for every seed, under the campaign's
budget otherwise. What was measured is written to docs/findings/figures.json after each training, so that a run that is
interrupted goes on where it stopped. Trainings of a campaign that was changed since are dropped and made again.
`draw.py` makes the pictures and the tables from the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mixforge.evaluator.budget import Budget
from mixforge.evaluator.evaluate import evaluate
from mixforge.evaluator.evaluation import Outcome
from mixforge.orchestrator.campaign import Baseline, Campaign

FOLDER = Path(__file__).parent
FIGURES = FOLDER.parents[1] / "docs" / "findings" / "figures.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One architecture, trained and scored under one campaign's budget with one seed."""

    campaign: str
    architecture: str
    """As the campaign's file gives it."""
    budget: str
    """Digest of all that decides what the training finds."""
    seed: int
    scores: dict[str, float]
    """On the test split."""
    params: int
    state_bytes: int
    """At the campaign's context."""
    train_s: float
    """Processor seconds."""
    device: str
    torch: str
    commit: str | None
    """Of the package, with `+dirty` where it had changes; None when installed."""


def read(path: Path) -> list[Training]:
    return [Training(**fields) for fields in json.loads(path.read_text())] if path.exists() else []


def write(path: Path, trainings: list[Training]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dataclasses.asdict(training)) for training in trainings)
    new = path.with_suffix(".new")
    new.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    # At once, so that nobody reads half a file and an interruption leaves the whole one.
    new.replace(path)


def train(campaign: Campaign, baseline: Baseline, budget: Budget) -> Training:
    """Raises RuntimeError where the training does not end well."""
    started = time.process_time()
    found = evaluate(baseline.architecture, budget)
    if found.outcome is not Outcome.ok:
        raise RuntimeError(f"{campaign.name}: {baseline.name}: {found.outcome}, {found.reason}")
    return Training(
        campaign=campaign.name,
        architecture=baseline.name,
        budget=budget.digest,
        seed=budget.seed,
        scores={task.figure: round(getattr(found, f"{task.figure}_test"), 4) for task in budget.tasks},
        params=found.params,
        state_bytes=found.state_bytes,
        train_s=round(time.process_time() - started, 3),
        device=found.environment.device,
        torch=found.environment.torch,
        commit=found.environment.commit,
    )


def wanted(campaigns: list[Campaign], seeds: int) -> Iterator[tuple[Campaign, Baseline, Budget]]:
    for campaign in campaigns:
        for seed in range(seeds):
            for baseline in campaign.baselines:
                yield campaign, baseline, dataclasses.replace(campaign.budget, seed=seed)


def run(campaigns: list[Campaign], seeds: int, path: Path) -> None:
    """Trains what `path` does not hold yet. Trainings of other campaigns are kept, also those that another run makes
    at the same time.
    """
    plan = list(wanted(campaigns, seeds))
    names = {campaign.name for campaign in campaigns}
    budgets = {(campaign.name, budget.digest) for campaign, _, budget in plan}
    found = read(path)
    kept = [one for one in found if one.campaign not in names or (one.campaign, one.budget) in budgets]
    if len(kept) < len(found):
        write(path, kept)
    done = {(one.campaign, one.architecture, one.budget) for one in kept}
    for number, (campaign, baseline, budget) in enumerate(plan, start=1):
        if (campaign.name, baseline.name, budget.digest) in done:
            continue
        made = train(campaign, baseline, budget)
        write(path, sorted([*read(path), made], key=lambda one: (one.campaign, one.seed)))
        scores = ", ".join(f"{name} {score:.3f}" for name, score in made.scores.items())
        sys.stdout.write(
            f"{number}/{len(plan)} {campaign.name} seed {budget.seed}: {baseline.name}: {scores}, "
            f"{made.train_s:.1f} s\n"
        )
        sys.stdout.flush()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="the beginning of a campaign's file name")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    campaigns = [Campaign.read(path) for path in sorted(FOLDER.glob(f"{asked.only}*.toml"))]
    if not campaigns:
        parser.error(f"no campaign's file begins with {asked.only!r}")
    run(campaigns, asked.seeds, FIGURES)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
