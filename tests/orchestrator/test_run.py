"""A search as a process of its own: killed, interrupted and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mixforge.db.store import Store
from mixforge.evaluator.evaluation import Outcome

DRIVER = Path(__file__).with_name("driver.py")


def begin(tmp_path, seconds):
    """A search in a process group of its own, as from a terminal."""
    home = tmp_path / "home that is not there"
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(tmp_path / "search.db"), str(tmp_path), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"},
    )


def wait_for(tmp_path, process, count):
    """Until so many trials are finished."""
    done = tmp_path / "done"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        text = done.read_text() if done.exists() else ""
        if text and int(text) >= count:
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no {count} trials were finished: {process.communicate()}")


def is_begun(path):
    """Whether a campaign is stored there, which is done right before workers are started."""
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database,
    ):
        return database.execute("select count(*) from campaign").fetchone()[0] > 0
    return False


def left_over(group, but=b"nothing"):
    """Processes of a session that are still there, waited for a little."""
    deadline = time.monotonic() + 15
    while True:
        found = [
            path.name
            for path in Path("/proc").glob("[0-9]*")
            if _session(path) == group and _state(path) != b"Z" and but not in _command(path)
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _session(path):
    try:
        return os.getsid(int(path.name))
    except (ProcessLookupError, PermissionError):
        return None


def _state(path):
    try:
        return (path / "stat").read_bytes().rsplit(b")", 1)[1].split()[0]
    except OSError:
        return b"Z"


def _command(path):
    try:
        return (path / "cmdline").read_bytes()
    except OSError:
        return b""


def trained(tmp_path):
    lines = (tmp_path / "log").read_text().splitlines()
    return Counter(line.split()[1] for line in lines if line.startswith("train"))


# A minute where nothing else runs.
@pytest.mark.timeout(400)
def test_killed_interrupted_and_gone_on(tmp_path):
    # First run: kill -9 of the driver.
    process = begin(tmp_path, 0.4)
    wait_for(tmp_path, process, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    # Two idle agents of Ray's look for the dead driver for a minute before they end, too.
    assert left_over(process.pid, but=b"Agent") == []
    with Store.open(tmp_path / "search.db", "read") as store:
        finished = [trial.digest for trial in store.trials(1) if trial.outcome is not None]
        begun = sum(trained(tmp_path).values())
    assert len(finished) >= 3

    # Second run: Ctrl-C, which a terminal sends to every process of the group.
    (tmp_path / "done").unlink()
    process = begin(tmp_path, 0.4)
    wait_for(tmp_path, process, 8)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert out.endswith("and stored. Run the same command again to go on from here.\n")
    assert left_over(process.pid) == []
    with Store.open(tmp_path / "search.db", "read") as store:
        assert not [attempt for attempt in store.attempts(1) if attempt.ended_at is None]
        assert store.spent_s(1) > 2

    # Third run: to the end, although a worker is killed. Nothing but our own line is printed.
    (tmp_path / "train-kill-any-0").touch()
    process = begin(tmp_path, 0.0)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("20 trials and 2 baselines are finished: all that the campaign asks for")
    assert out.count("\n") == 1
    with Store.open(tmp_path / "search.db", "read") as store:
        trials = store.trials(1)
        assert [trial.number for trial in trials] == list(range(22))
        assert {trial.outcome for trial in trials} == {Outcome.ok}
        cut_off = [attempt for attempt in store.attempts(1) if attempt.outcome is not Outcome.ok]
    # What was finished was not run again; what was cut off was run again once for each time.
    again = {digest: times for digest, times in trained(tmp_path).items() if times > 1}
    assert again.keys().isdisjoint(finished)
    assert sum(times - 1 for times in again.values()) <= len(cut_off) <= 5
    assert begun >= len(finished)


def test_sigterm_during_the_start_ends_the_search(tmp_path):
    process = begin(tmp_path, 0.2)
    while not is_begun(tmp_path / "search.db") and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (143, "")
    assert "Run the same command again" in out
    assert left_over(process.pid) == []


def test_a_real_search(tmp_path, stub):
    """Candidates are trained and profiled indeed, with their weights kept; two trials, on the session's
    machine.
    """
    script = tmp_path / "search.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from mixforge.db.store import Store\n"
        "from mixforge.orchestrator.campaign import Campaign\n"
        "from mixforge.orchestrator.run import run\n"
        "folder = Path(sys.argv[1])\n"
        "with Store.open(folder / 'search.db', 'create') as store:\n"
        "    run(Campaign.read(folder / 'real.toml'), store, workers=1, weights=folder / 'weights')\n"
    )
    (tmp_path / "words").mkdir()
    for number in range(12):
        (tmp_path / "words" / f"{number}.txt").write_text(f"the quick brown fox {number} " * 400)
    text = stub.CAMPAIGN.replace("trials = 20", "trials = 1").replace("deadline_s = 5", "deadline_s = 60")
    text = text.replace(', "lm(gdn + swiglu, width=32)"', "").replace("attn + swiglu", "conv + mlp")
    text += f"""
[tasks.text]
path = "{tmp_path / "words"}"
length = 32
[tasks.text.training]
steps = 2
batch = 4
lr = 3e-3
"""
    (tmp_path / "real.toml").write_text(text)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=100)
    with Store.open(tmp_path / "search.db", "read") as store:
        trials = store.trials(1)
        assert [(trial.outcome, trial.reason) for trial in trials] == [(Outcome.ok, None)] * 2
        for trial in trials:
            assert {"recall", "bits_per_byte", "decode_ms", "params", "peak_bytes"} <= trial.figures.keys()
            found = store.evaluation(trial.digest, trial.budget)
            assert (tmp_path / "weights" / found.weights).stat().st_size > 1000
            assert found.environment.threads == 1
