"""A tiny campaign, a pool without processes whose clock is its own, and one Ray for the whole session."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import pytest
from ray import cloudpickle

from mixforge.db.store import Store
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.cluster import local_cluster
from mixforge.orchestrator.interruption import Interruption
from mixforge.orchestrator.ledger import Ledger
from mixforge.orchestrator.loop import Loop
from mixforge.orchestrator.pace import Pace
from mixforge.orchestrator.workers import Ended, Workers

_spec = importlib.util.spec_from_file_location("orchestrator_stub", Path(__file__).with_name("stub.py"))
stub_module = importlib.util.module_from_spec(_spec)
sys.modules["orchestrator_stub"] = stub_module
_spec.loader.exec_module(stub_module)
# Workers cannot import this folder, so the stub travels with the job's function.
cloudpickle.register_pickle_by_value(stub_module)


class StillPool:
    """Workers without processes: a job takes the seconds that `seconds(job)` says, by a clock of its own."""

    def __init__(self, size, do, seconds=lambda job: 1.0):
        self.size, self._do, self._seconds = size, do, seconds
        self.now = 0.0
        self._jobs = {}
        self.history = []
        """(slot, stage, digest, start, end) of every job that ended."""

    def clock(self):
        return self.now

    def idle(self):
        return tuple(slot for slot in range(self.size) if slot not in self._jobs)

    def submit(self, slot, job, limit_s):
        assert slot not in self._jobs
        self._jobs[slot] = (job, self.now, self.now + self._seconds(job))

    def wait(self, timeout_s):
        if not self._jobs:
            self.now += timeout_s
            return ()
        self.now = min(self.now + timeout_s, *(end for _, _, end in self._jobs.values()))
        return tuple(self._end(slot) for slot in sorted(self._jobs) if self._jobs[slot][2] <= self.now)

    def mark(self, slot):
        return None

    def _end(self, slot):
        job, start, end = self._jobs.pop(slot)
        self.history.append((slot, job.stage, job.architecture.digest, start, end))
        return Ended(slot=slot, job=job, result=self._do(job), seconds=end - start)


@pytest.fixture(scope="session")
def stub():
    return stub_module


@pytest.fixture
def campaign(stub):
    return Campaign.parse(stub.CAMPAIGN)


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "search.db", "create") as opened:
        yield opened


@pytest.fixture
def pool_of(stub):
    """Makes a pool without processes; its jobs take a second each, and are answered by the stub."""

    def make(size, do=stub.answer, seconds=lambda job: 1.0):
        return StillPool(size, do, seconds)

    return make


@pytest.fixture
def still(pool_of):
    return pool_of(2)


@pytest.fixture
def start(stub):
    """Makes a loop on a pool."""

    def begin(campaign, store, pool, *, interruption=None, watch=None, grace_s=20.0, weights=None):
        ledger = Ledger(campaign, store, stub._environment())
        pace = Pace(
            clock=pool.clock if isinstance(pool, StillPool) else time.monotonic,
            workers=pool.size,
            before_s=store.spent_s(ledger.id),
            hours=campaign.hours,
            durations=ledger.durations,
        )
        return Loop(
            campaign,
            store,
            ledger,
            pool,
            interruption or Interruption(),
            pace,
            watch=watch,
            grace_s=grace_s,
            weights=weights,
        )

    return begin


@pytest.fixture(scope="session")
def cluster():
    with local_cluster(2) as folder:
        yield folder


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def workers(cluster, faults, stub):
    """Two real workers with the stub's work, which looks for faults in the folder `faults`."""
    pool = Workers(2, folder=cluster, do=stub.faulty(faults))
    yield pool
    pool.close()
