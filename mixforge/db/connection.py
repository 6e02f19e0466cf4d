"""One database: how it is reached, and what differs between SQLite and PostgreSQL.

SQLite runs in write-ahead mode. A writing transaction takes the write lock when it begins: one that reads
first and asks for the lock later fails at once under contention, or loses an update without a word.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

Mode = Literal["read", "write", "create"]
BUSY_S = 30.0
"""How long a transaction waits for another process's."""


class StoreError(ValueError):
    """The database cannot be used as it was asked to be; the message says why, and the way out."""


class StoreUnwritable(StoreError):
    """The database could not be written: disk full, read-only, locked by another process, or unreachable."""


class Database:
    """An open database, which gives transactions."""

    def __init__(self, location: str | Path, mode: Mode = "write") -> None:
        """Opens nothing yet. `location` is a URL, or the path of a SQLite file."""
        self.location = location
        self.url = read_url(location)
        self.mode: Mode = mode
        self.sqlite = self.url.get_backend_name() == "sqlite"
        if self.sqlite:
            _check_file(self.path, mode)
        self.engine = _sqlite_engine(self.path, mode) if self.sqlite else _server(self.url)

    @property
    def path(self) -> Path:
        """The file of a SQLite database."""
        return Path(self.url.database or "")

    @property
    def name(self) -> str:
        """How messages call it; a password is left out."""
        return str(self.path) if self.sqlite else self.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction that sees one state of the database."""
        with self._speaking_plainly(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that is stored whole when the block ends, or not at all."""
        if self.mode == "read":
            raise StoreUnwritable(f"{self.name} was opened for reading")
        with self._speaking_plainly(), self.engine.connect() as connection:
            writing = connection.execution_options(mixforge_writes=True)
            with writing.begin():
                yield writing

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _speaking_plainly(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as failure:
            error = explain(failure, self.name)
            if error is None:
                raise
            raise error from failure


def read_url(location: str | Path) -> URL:
    """The URL of a database; a plain path is that of a SQLite file, `postgresql:` uses psycopg."""
    text = str(location)
    if "://" not in text:
        if not text or "\0" in text:
            raise StoreError(f"{text!r} is not the path of a database")
        return URL.create("sqlite", database=text)
    try:
        url = make_url(text)
    except ArgumentError as failure:
        raise StoreError(f"{text!r} is not a database URL; give a path, or sqlite:///PATH") from failure
    backend = url.get_backend_name()
    if backend == "sqlite" and url.database in (None, "", ":memory:"):
        raise StoreError("a campaign cannot be kept in memory; give a path, or sqlite:///PATH")
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StoreError(f"{backend!r} is not a supported database; use sqlite or postgresql")
    return url


def explain(failure: DBAPIError, name: str) -> StoreError | None:
    """Says in the user's words what the database driver reported, or None for what only a bug can cause."""
    said = str(failure.orig)
    if "file is not a database" in said:
        return StoreError(f"{name} is not a database")
    if "malformed" in said:
        return StoreError(f"{name} is damaged ({said}); copy it, then try `sqlite3 {name} .recover`")
    for sign, meaning in _UNWRITABLE.items():
        if sign in said:
            return StoreUnwritable(f"{name} cannot be written or reached: {meaning} ({said})")
    return None


_UNWRITABLE = {
    "is full": "the disk is full; free some space and run the same command again",
    "disk I/O error": "the disk refused it; is it full, or over a quota? Then run the same command again",
    "readonly": "it is read-only; make the file and its folder writable, or copy it",
    "unable to open": "the file or its folder cannot be opened; check that both exist and their permissions",
    "locked": f"another process has held it for {BUSY_S:.0f} s; end that one, then run this again",
    "onnection": "the database server does not answer",
}


# A database refuses NaN in a JSON column, or cannot read it back, so it is refused before it gets there.
_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def _check_file(path: Path, mode: Mode) -> None:
    if path.is_dir():
        raise StoreError(f"{path} is a folder, not a database file")
    if mode == "create":
        if not path.parent.is_dir():
            raise StoreError(f"{path.parent} is not a folder, so {path} cannot be created in it")
    elif not path.is_file():
        raise StoreError(f"there is no database {path}; `mixforge search` creates one")


def _sqlite_engine(path: Path, mode: Mode) -> Engine:
    access = {"read": "ro", "write": "rw", "create": "rwc"}[mode]
    address = f"{path.absolute().as_uri()}?mode={access}"
    if (
        mode == "read"
        and not os.access(path.parent, os.W_OK)
        and not path.with_name(f"{path.name}-wal").exists()
    ):
        # On read-only media SQLite cannot make the lock files of write-ahead mode, and nobody can be writing.
        address += "&immutable=1"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(address, uri=True, timeout=BUSY_S, check_same_thread=False)

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, json_serializer=_json)

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, entry: ConnectionPoolEntry) -> None:
        # The driver's own transaction handling is off: it begins none for a SELECT.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        if mode != "read":
            connection.execute("PRAGMA journal_mode = WAL")
            # Loses nothing when a process dies; the last commits may go when the power does.
            connection.execute("PRAGMA synchronous = NORMAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("mixforge_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _server(url: URL) -> Engine:
    """An engine for a database server. Raises StoreError where its driver is not installed."""
    try:
        return create_engine(url, json_serializer=_json, pool_pre_ping=True)
    except ImportError as error:
        raise StoreError(
            f"{url.drivername} needs {error.name}; install it: pip install 'mixforge[postgres]'"
        ) from None
