"""Several processes on one database, and processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter

from mixforge.db.store import Store
from mixforge.db.values import State
from mixforge.evaluator.evaluation import Outcome

# Each claims every trial and gives it up again, so that tokens cross; a record counts once.
CLAIM = """
import sys
from mixforge.db.store import StaleToken, Store
from mixforge.evaluator.evaluation import Outcome
store = Store.open(sys.argv[1])
recorded = []
for trial in [int(key) for key in sys.argv[3].split(",")]:
    try:
        token = store.claim(trial, "train", sys.argv[2])
    except ValueError:
        continue
    try:
        store.record_failure(token, Outcome.diverged, sys.argv[2], seconds=1.0, last=True)
        recorded.append(trial)
    except StaleToken:
        pass
print(",".join(map(str, recorded)))
"""


def test_each_trial_is_recorded_once(path, campaign, store, samples):
    keys = [store.propose(campaign, samples.proposal(number)) for number in range(60)]
    listed = ",".join(map(str, keys))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(path), f"worker {index}", listed],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(4)
    ]
    said = [worker.communicate(timeout=100)[0].strip() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    recorded = Counter(int(key) for line in said if line for key in line.split(","))
    assert recorded == Counter(keys)
    trials = store.trials(campaign)
    assert {trial.outcome for trial in trials} == {Outcome.diverged}
    # Who recorded a trial held its newest token.
    newest = {attempt.trial: attempt for attempt in store.attempts(campaign)}
    assert [newest[trial.id].worker for trial in trials] == [trial.reason for trial in trials]
    assert all(attempt.ended_at is not None for attempt in store.attempts(campaign))


WORK = """
import sys
from mixforge.db.store import Store
from mixforge.db.values import Proposal, StoredArchitecture
from mixforge.evaluator.evaluation import Outcome
store = Store.open(sys.argv[1])
campaign = store.campaign("laptop").id
for number in range(100_000):
    digest = f"{number:064x}"
    architecture = StoredArchitecture(
        digest=digest, text=digest, canonical=digest, width=1, depth=1, mixers=("attn",)
    )
    proposal = Proposal(number=number, architecture=architecture, budget="b", origin="random")
    trial = store.propose(campaign, proposal)
    token = store.claim(trial, "train", "w")
    store.record_failure(token, Outcome.diverged, "", seconds=1.0, last=True)
    print(number, flush=True)
"""


def test_what_was_recorded_survives_a_kill(path, campaign, store):
    driver = subprocess.Popen([sys.executable, "-c", WORK, str(path)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    for _ in range(20):
        driver.stdout.readline()
    time.sleep(0.013)
    os.kill(driver.pid, signal.SIGKILL)
    said = driver.stdout.read().split()
    driver.stdout.close()
    driver.wait(timeout=10)
    last = int(said[-1]) if said else 19
    finished = [trial for trial in store.trials(campaign) if trial.state is State.finished]
    assert [trial.number for trial in finished[: last + 1]] == list(range(last + 1))
    # At most the one that was under way is not finished, and it waits again.
    opened = store.abandon_open_attempts(campaign)
    waiting = [trial for trial in store.trials(campaign) if trial.state is not State.finished]
    assert opened <= len(waiting) <= 1
    assert all(trial.state is State.proposed for trial in waiting)


COUNT = """
import sys
from mixforge.db.store import Store
store = Store.open(sys.argv[1])
for _ in range(100):
    with store.database.write() as connection:
        spent = connection.exec_driver_sql("SELECT seconds FROM run WHERE id = 1").scalar_one()
        connection.exec_driver_sql("UPDATE run SET seconds = ? WHERE id = 1", (spent + 1,))
"""


def test_no_update_is_lost(path, campaign, store):
    store.begin_run(campaign, "driver")
    writers = [subprocess.Popen([sys.executable, "-c", COUNT, str(path)]) for _ in range(3)]
    assert [writer.wait(timeout=100) for writer in writers] == [0] * 3
    assert store.spent_s(campaign) == 300.0


def test_reader_sees_one_state(path, campaign, store, samples):
    store.propose(campaign, samples.proposal(0))
    with Store.open(path, "read") as reader, reader.database.read() as connection:
        count = "SELECT count(*) FROM trial"
        assert connection.exec_driver_sql(count).scalar_one() == 1
        store.propose(campaign, samples.proposal(1))
        assert connection.exec_driver_sql(count).scalar_one() == 1
