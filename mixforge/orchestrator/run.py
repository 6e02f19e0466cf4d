"""Runs a campaign on this machine: opens the workers, closes the loop from what was found to what is tried
next.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from mixforge.db.store import Store
from mixforge.evaluator.environment import environment
from mixforge.kernels.backend import check_backend
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.cluster import local_cluster
from mixforge.orchestrator.interruption import listening
from mixforge.orchestrator.ledger import Ledger
from mixforge.orchestrator.loop import GRACE_S, Loop, Watch
from mixforge.orchestrator.pace import Pace
from mixforge.orchestrator.progress import Ending
from mixforge.orchestrator.workers import Work, Workers, work


def run(
    campaign: Campaign,
    store: Store,
    *,
    device: str = "cpu",
    workers: int | None = None,
    weights: Path | None = None,
    watch: Watch | None = None,
    do: Work = work,
    grace_s: float = GRACE_S,
) -> Ending:
    """Search until the campaign's trials or hours are spent, or a signal asks to stop. What is stored is gone
    on from.

    device: where candidates are trained and profiled. workers: how many train at once; by default one for
    each core that this process may use. weights: the folder in which trained weights are kept, None to keep
    none. watch: called with the progress, at most ten times a second. `do` takes the place of a worker's
    work, for tests. grace_s: how far past the budget's deadline a worker is taken to hang.
    Raises ValueError where the store holds another campaign of this name, the budget's data cannot be had or its
    backend cannot run on the device, and RuntimeError where workers cannot be started or another run took the
    campaign over.
    """
    if workers is not None and not 1 <= workers <= 1024:
        raise ValueError(f"workers {workers} is not between 1 and 1024")
    check_backend(campaign.budget.backend, device)
    size = workers or len(os.sched_getaffinity(0))
    if weights is not None:
        weights.mkdir(parents=True, exist_ok=True)
    with listening() as interruption:
        ledger = Ledger(campaign, store, environment(device))
        pace = Pace(
            clock=time.monotonic,
            workers=size,
            before_s=store.spent_s(ledger.id),
            hours=campaign.hours,
            durations=ledger.durations,
        )
        with local_cluster(size, gpus=0 if device == "cpu" else 1) as folder:
            pool = Workers(size, folder=folder, device=device, do=do)
            try:
                loop = Loop(
                    campaign,
                    store,
                    ledger,
                    pool,
                    interruption,
                    pace,
                    weights=weights,
                    watch=watch,
                    grace_s=grace_s,
                )
                return loop.run()
            finally:
                pool.close()
