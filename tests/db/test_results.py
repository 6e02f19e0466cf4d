"""What Python users see, and what SQL users see."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing

import pandas
import pytest

import mixforge
from mixforge.search_space.notation import parse


@pytest.fixture
def found(path, store, campaign, samples):
    samples.finish(store, campaign, 0, 2.5, 0.5)
    samples.finish(store, campaign, 1, 2.0, 1.0)
    store.spend(store.begin_run(campaign, "host:1"), 5.0)
    with mixforge.open(path) as results:
        yield results


def test_python_users(found):
    assert [campaign.name for campaign in found.campaigns] == ["laptop"]
    assert len(found.architectures) == 2
    assert [trial.number for trial in found.trials("laptop")] == [0, 1]
    assert len(found.attempts("laptop")) == 4
    assert found.status("laptop").spent_s == 5.0
    best = found.front(("bits_per_byte", "decode_ms"), campaign="laptop")
    assert [trial.number for trial in best] == [1, 0]
    assert found.query("number = 1", columns=("number", "origin")).rows == ((1, "random"),)
    assert found.show(best[0].digest[:12]).trials[0][1] == best[0]
    for wrong in (
        found.trials,
        found.attempts,
        found.status,
        lambda name: found.front(("recall",), campaign=name),
    ):
        with pytest.raises(ValueError, match="no campaign 'none'"):
            wrong("none")


def test_architecture_can_be_built_on(found):
    trial = found.trials("laptop")[1]
    assert found.architecture(trial.digest[:12]) == parse(trial.text)


def test_frame(found):
    frame = found.frame("bits_per_byte < 2.4")
    assert isinstance(frame, pandas.DataFrame)
    assert frame["number"].tolist() == [1]
    assert frame["bits_per_byte_test"].tolist() == [2.1]


def test_sql_users(path, found):
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT campaign, number, bits_per_byte, decode_ms, mixers FROM trials ORDER BY number"
        rows = connection.execute(query).fetchall()
        assert rows[1] == ("laptop", 1, 2.0, pytest.approx(1.1), "attn swiglu")
        assert connection.execute("SELECT * FROM progress").fetchall() == [
            ("laptop", "random", "finished", "ok", 2, 0)
        ]
        assert connection.execute("SELECT device, context FROM profiles").fetchall() == [("Test CPU", 64)] * 2
        assert connection.execute("SELECT * FROM failures").fetchall() == []


def test_no_torch_is_loaded():
    script = (
        "import sys, mixforge; mixforge.open; import mixforge.db.summary; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
