"""What searches have found, for Python: `mixforge.open("runs/mixforge.db")`.

with mixforge.open("runs/mixforge.db") as results:
    for trial in results.front(("bits_per_byte", "decode_ms"), campaign="laptop"):
        print(trial.text, trial.figures)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from sqlalchemy import select

from mixforge.db import encoding, query, summary, tables
from mixforge.db.condition import COLUMNS
from mixforge.db.query import Answer
from mixforge.db.schema import Migration
from mixforge.db.store import Store
from mixforge.db.values import Attempt, Dossier, Status, StoredArchitecture, StoredCampaign, Trial

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

    from mixforge.search_space.architecture import Architecture


class Results:
    """A database opened for reading. Use it in a `with` block, or close it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._store.close()

    @property
    def migration(self) -> Migration | None:
        """From which schema opening it has brought the database to the newest; None where it had that."""
        return self._store.migration

    @property
    def campaigns(self) -> tuple[StoredCampaign, ...]:
        """All campaigns, oldest first."""
        return self._store.campaigns()

    @property
    def architectures(self) -> tuple[StoredArchitecture, ...]:
        """All architectures that were proposed or profiled, by digest."""
        table = tables.architecture
        with self._store.database.read() as connection:
            found = connection.execute(select(table).order_by(table.c.digest)).mappings()
            return tuple(encoding.architecture_from(row) for row in found)

    def trials(self, campaign: str) -> tuple[Trial, ...]:
        """The trials of a campaign, by number."""
        return self._store.trials(self._store.campaign(campaign).id)

    def attempts(self, campaign: str) -> tuple[Attempt, ...]:
        """Every attempt at a campaign's trials, oldest first."""
        return self._store.attempts(self._store.campaign(campaign).id)

    def status(self, campaign: str) -> Status:
        """Counts, time spent and best figures of a campaign."""
        return summary.status(self._store, self._store.campaign(campaign))

    def query(
        self,
        where: str | None = None,
        *,
        order: str | None = None,
        columns: Sequence[str] = COLUMNS,
        limit: int | None = None,
    ) -> Answer:
        """Trials under a condition such as `"bits_per_byte < 2.2 and gdn in mixers"`, as a table."""
        return query.ask(self._store, where=where, order=order, columns=columns, limit=limit)

    def front(
        self, figures: Sequence[str], *, where: str | None = None, campaign: str | None = None
    ) -> tuple[Trial, ...]:
        """The ok trials that no other one beats in the named figures, best in the first figure first."""
        if campaign is not None:
            self._store.campaign(campaign)
        return query.front(self._store, figures, where=where, campaign=campaign)

    def show(self, digest: str) -> Dossier:
        """Everything that is stored of one architecture; the first digits of its digest are enough."""
        return summary.dossier(self._store, summary.find(self._store, digest))

    def architecture(self, digest: str) -> Architecture:
        """An architecture, to build or change; the first digits of its digest are enough."""
        # Loaded only here: the mixers bring torch with them, which takes a second.
        from mixforge.search_space.notation import parse

        return parse(summary.find(self._store, digest).text)

    def frame(self, where: str | None = None, *, columns: Sequence[str] = COLUMNS) -> pandas.DataFrame:
        """Trials as a data frame. Needs pandas: `pip install mixforge[frames]`."""
        import pandas

        answer = self.query(where, columns=columns)
        return pandas.DataFrame.from_records(list(answer.rows), columns=list(answer.columns))


def open(location: str | Path) -> Results:
    """Opens a database for reading, by path or URL. Raises ValueError where it cannot be."""
    return Results(Store.open(location, "read"))
