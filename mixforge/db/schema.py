"""Which schema a database has, and how it gets the newest one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from mixforge.db.connection import Database, StoreError, StoreUnwritable
from mixforge.db.tables import SCHEMA, VERSION_TABLE

MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """What was done to a database that had an older schema."""

    name: str
    """How messages call the database."""
    before: str
    after: str
    copy: Path | None
    """The file as it was; None of a server's, which is not copied."""


def prepare(database: Database) -> Migration | None:
    """Leaves the database with the newest schema, and says from which it was brought there, None where it had it.

    An empty one is filled where it was opened to be created. An older one is copied beside itself first
    (SQLite only), then migrated in one transaction, also where it was opened for reading.
    Raises StoreError for what is not ours, or newer than this code.
    """
    with database.read() as connection:
        found = _revision(connection, database)
    if found == SCHEMA:
        return None
    if found is None and database.mode != "create":
        raise StoreError(f"{database.name} is an empty database; `mixforge search FILE` fills one")
    if database.mode == "read":
        return _migrate_in_passing(database, found)
    copy = None
    if found is not None and database.sqlite:
        copy = database.path.with_name(f"{database.path.name}.schema-{found}")
        _copy(database.path, copy)
    with database.write() as connection:
        # Another process may have migrated it while this one waited for the lock.
        if _revision(connection, database) == SCHEMA:
            return None
        _migrate(connection)
    return None if found is None else Migration(name=database.name, before=found, after=SCHEMA, copy=copy)


def _revision(connection: Connection, database: Database) -> str | None:
    """The revision of a database of ours, None for an empty one."""
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    if VERSION_TABLE not in tables:
        some = ", ".join(tables[:5])
        raise StoreError(f"{database.name} is a database, but not one of Mixforge's (its tables: {some})")
    query = text(f"SELECT version_num FROM {VERSION_TABLE}")
    found: str | None = connection.execute(query).scalar_one_or_none()
    if found is not None and found > SCHEMA:
        raise StoreError(
            f"{database.name} was written by a newer Mixforge (schema {found}, this one knows {SCHEMA}); "
            "upgrade with `pip install -U mixforge`"
        )
    return found


def _migrate_in_passing(database: Database, found: str | None) -> Migration | None:
    writable = Database(database.location, "write")
    try:
        return prepare(writable)
    except StoreUnwritable as failure:
        raise StoreUnwritable(
            f"{database.name} has the older schema {found} and cannot be migrated to {SCHEMA} where it is; "
            f"copy it to a folder that can be written ({failure})"
        ) from failure
    finally:
        writable.close()


def _migrate(connection: Connection) -> None:
    # Loaded only here: it takes a tenth of a second, and nearly every opening needs no migration.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
