"""The database as commands open it: where that changes its schema, it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixforge.cli.output import narrate

if TYPE_CHECKING:
    from mixforge.db.connection import Mode
    from mixforge.db.results import Results
    from mixforge.db.schema import Migration
    from mixforge.db.store import Store


def open_results(db: str) -> Results:
    """A database opened for reading. Raises ValueError where it cannot be."""
    from mixforge.db.results import open

    results = open(db)
    _tell(results.migration)
    return results


def open_store(db: str, mode: Mode) -> Store:
    """A database opened for writing. Raises ValueError where it cannot be."""
    from mixforge.db.store import Store

    store = Store.open(db, mode)
    _tell(store.migration)
    return store


def _tell(migration: Migration | None) -> None:
    if migration is None:
        return
    kept = "" if migration.copy is None else f"; as it was it is kept in {migration.copy}"
    narrate(f"{migration.name} was brought from schema {migration.before} to {migration.after}{kept}")
