"""Faults by doing: real workers are killed, stopped, hung and made to fail; the campaign goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixforge.evaluator.evaluation import Outcome
from mixforge.orchestrator.campaign import Campaign

# Ray starts and stops processes several times in a test, which takes long on a busy machine.
pytestmark = pytest.mark.timeout(360)


@pytest.fixture
def small(stub):
    """Six trials, and a deadline that a worker is soon past."""
    text = stub.CAMPAIGN.replace("trials = 20", "trials = 6").replace("deadline_s = 5", "deadline_s = 0.5")
    return Campaign.parse(text)


@pytest.fixture
def suffer(faults):
    """Orders a fault for the next job of a stage, so many times; `digest` for one architecture's jobs alone."""

    def order(stage, kind, digest="any", times=1):
        for number in range(times):
            (faults / f"{stage}-{kind}-{digest[:8]}-{number}").touch()

    yield order
    for left in faults.glob("*-*"):
        left.unlink()


def attempts(store, outcome):
    return [attempt for attempt in store.attempts(1) if attempt.outcome is outcome]


def test_a_worker_that_dies_or_hangs_costs_one_attempt(small, store, workers, start, suffer, capfd):
    one, other = (baseline.architecture.digest for baseline in small.baselines)
    suffer("train", "kill", one)
    suffer("train", "hang", other)
    suffer("profile", "raise", one)
    suffer("profile", "stop", other)
    # A worker's death is to be heard of before its deadline, on a busy machine too.
    ending = start(small, store, workers, grace_s=7.5).run()
    assert ending.progress.outcomes == {Outcome.ok: 8}
    killed, raised = attempts(store, Outcome.crashed)
    assert (killed.stage, killed.reason) == ("train", "its worker process died (attempt 1 of 2)")
    assert raised.reason == "RuntimeError: a worker that fails by itself (attempt 1 of 2)"
    assert "_suffer" in raised.trace
    hung, stopped = attempts(store, Outcome.timed_out)
    assert (hung.stage, stopped.stage) == ("train", "profile")
    assert all("no answer within 8 s, so its worker was ended" in lost.reason for lost in (hung, stopped))
    assert all(lost.seconds >= 8 for lost in (hung, stopped))
    assert len(store.attempts(1)) == 16 + 4
    # Ray's paragraphs on dead workers reach nobody.
    assert capfd.readouterr() == ("", "")


def test_an_architecture_that_is_poison_ends_after_two_attempts(small, store, workers, start, suffer):
    one, other = (baseline.architecture.digest for baseline in small.baselines)
    suffer("train", "kill", one, times=5)
    suffer("train", "hang", other, times=5)
    ending = start(small, store, workers, grace_s=7).run()
    assert ending.progress.outcomes == {Outcome.ok: 6, Outcome.crashed: 1, Outcome.timed_out: 1}
    ends = {trial.digest: trial.outcome for trial in store.trials(1)}
    assert (ends[one], ends[other]) == (Outcome.crashed, Outcome.timed_out)
    assert len(attempts(store, Outcome.crashed)) == len(attempts(store, Outcome.timed_out)) == 2


def test_progress_shows_the_steps_of_a_training(small, store, workers, start, faults):
    seen = []
    (faults / "train-slow-any-0").touch()
    start(small, store, workers, watch=seen.append).run()
    running = [each for progress in seen for each in progress.running if each.step is not None]
    assert running
    assert {(each.task, each.steps, each.loss) for each in running} == {("mqar", 4, 1.0)}


def test_nothing_listens_to_other_machines(workers):
    us = os.getsid(0)
    sockets = {
        inode for path in Path("/proc").glob("[0-9]*") if _session(path) == us for inode in _sockets(path)
    }
    listening = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    ours = [fields[1].split(":")[0] for fields in listening if fields[9] in sockets]
    assert len(ours) >= 4
    assert all(address in ("0100007F", "0000000000000000FFFF00000100007F") for address in ours)


def _session(path):
    try:
        return os.getsid(int(path.name))
    except OSError:
        return None


def _sockets(path):
    try:
        links = [os.readlink(link) for link in (path / "fd").iterdir()]
    except OSError:
        return []
    return [link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")]
