"""What is not a usable database is said in the user's words, and a fault leaves what was stored."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mixforge.db import connection
from mixforge.db.connection import StoreError, StoreUnwritable, read_url
from mixforge.db.store import Store


@pytest.mark.parametrize(
    ("location", "meaning"),
    [
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
        ("a b.db", "sqlite:///a b.db"),
        ("postgresql://me@host/db", "postgresql+psycopg://me@host/db"),
    ],
)
def test_location_is_a_path_or_url(location, meaning):
    assert read_url(location).render_as_string(hide_password=False) == meaning


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("", "not the path"),
        ("a\0b", "not the path"),
        ("sqlite://", "cannot be kept in memory"),
        ("sqlite:///:memory:", "cannot be kept in memory"),
        ("mysql://host/db", "'mysql' is not a supported database"),
        ("://", "not a database URL"),
    ],
)
def test_location_that_is_neither(location, message):
    with pytest.raises(StoreError, match=message):
        read_url(location)


def test_missing_file(tmp_path):
    for mode in ("read", "write"):
        with pytest.raises(StoreError, match=r"no database .*none\.db.*mixforge search"):
            Store.open(tmp_path / "none.db", mode)
    with pytest.raises(StoreError, match="is not a folder"):
        Store.open(tmp_path / "none" / "none.db", "create")
    with pytest.raises(StoreError, match="is a folder"):
        Store.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_no_database(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("These are notes, and not a database.\n" * 100)
    for mode in ("read", "write", "create"):
        with pytest.raises(StoreError, match="not a database"):
            Store.open(path, mode)
    assert path.read_text().startswith("These are notes")


def test_database_of_another_program(tmp_path):
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE alembic_version (version_num TEXT)")
    with pytest.raises(StoreError, match=r"not one of Mixforge's .*alembic_version"):
        Store.open(path, "create")


def test_empty_file(tmp_path):
    path = tmp_path / "empty.db"
    path.touch()
    with pytest.raises(StoreError, match="empty database"):
        Store.open(path)
    Store.open(path, "create").close()
    Store.open(path).close()


def test_damaged_file(path, campaign, store, samples):
    for number in range(40):
        store.propose(campaign, samples.proposal(number))
    store.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (path.stat().st_size - 4096))
    with pytest.raises(StoreError, match=r"damaged.*recover"), Store.open(path) as damaged:
        damaged.trials(campaign)


def test_reading_never_writes(path, campaign, store, samples):
    store.propose(campaign, samples.proposal(0))
    with Store.open(path, "read") as reader:
        assert len(reader.trials(campaign)) == 1
        with pytest.raises(StoreUnwritable, match="opened for reading"):
            reader.propose(campaign, samples.proposal(1))


def test_other_program_that_holds_the_file(path, campaign, store, samples, monkeypatch):
    store.close()
    monkeypatch.setattr(connection, "BUSY_S", 0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other, Store.open(path) as waiting:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnwritable, match=r"another process.*locked"):
            waiting.propose(campaign, samples.proposal(0))
        # Readers are not held up.
        assert waiting.trials(campaign) == ()
        other.execute("ROLLBACK")
        waiting.propose(campaign, samples.proposal(0))


FILL = """
import resource, signal, sys
from mixforge.db.connection import StoreUnwritable
from mixforge.db.store import Store
from mixforge.db.values import Proposal, StoredArchitecture
store = Store.open(sys.argv[1])
campaign = store.add_campaign("laptop", "d", "", 1)
# Writing past this size fails, as it does on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
number = 0
try:
    while True:
        text = f"{number:064x}"
        architecture = StoredArchitecture(
            digest=text, text=text, canonical="x" * 5000, width=1, depth=1, mixers=("attn",)
        )
        proposal = Proposal(number=number, architecture=architecture, budget="b", origin="random")
        store.propose(campaign, proposal)
        number += 1
except StoreUnwritable as error:
    print(number)
    print(error)
"""


def test_full_disk_keeps_what_was_stored(path):
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    stored, message = done.stdout.splitlines()
    assert str(path) in message
    assert "disk" in message
    with Store.open(path) as store:
        assert len(store.trials(1)) == int(stored) > 5
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


READ_ONLY = """
import os, sys
from mixforge.db.connection import StoreUnwritable
from mixforge.db.store import Store
Store.open(sys.argv[1], "read").close()
if os.getuid() == 0:
    os.setuid(65534)
with Store.open(sys.argv[1], "read") as store:
    print(len(store.trials(1)))
try:
    with Store.open(sys.argv[1]) as store:
        store.add_campaign("new", "d", "", 1)
except StoreUnwritable as error:
    print(error)
"""


def test_read_only_folder_is_read(path, campaign, store, samples):
    store.propose(campaign, samples.proposal(0))
    store.close()
    # Not below pytest's own folder, which other users may not enter.
    with TemporaryDirectory() as name:
        folder = Path(name)
        copy = folder / "mixforge.db"
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o444)
        folder.chmod(0o555)
        command = [sys.executable, "-c", READ_ONLY, str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    count, message = done.stdout.splitlines()
    assert count == "1"
    assert "read-only" in message or "permissions" in message
