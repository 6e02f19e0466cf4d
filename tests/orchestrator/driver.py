"""Runs the tiny campaign as a user's process would, for tests that end it: driver.py DATABASE FOLDER SECONDS."""

from __future__ import annotations

import sys
from pathlib import Path

import stub
from ray import cloudpickle

from mixforge.db.store import Store
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.run import run

cloudpickle.register_pickle_by_value(stub)


def main(database: str, folder: str, seconds: str) -> int:
    def watch(progress):
        (Path(folder) / "done").write_text(str(progress.trials_done + progress.baselines_done))

    with Store.open(database, "create") as store:
        ending = run(
            Campaign.parse(stub.CAMPAIGN),
            store,
            workers=2,
            watch=watch,
            do=stub.faulty(Path(folder), float(seconds)),
        )
    sys.stdout.write(ending.sentence + "\n")
    return 128 + ending.signal if ending.signal else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
