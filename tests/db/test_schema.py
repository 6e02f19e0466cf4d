"""Migrations lead to the tables the code knows, and every database that was ever written still opens."""

from __future__ import annotations

import io
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from mixforge.db import schema
from mixforge.db.connection import StoreError
from mixforge.db.results import open as open_results
from mixforge.db.schema import Migration
from mixforge.db.store import Store
from mixforge.db.tables import SCHEMA, VERSION_TABLE, metadata
from mixforge.db.views import views

OLD = sorted((Path(__file__).parent / "schemas").glob("*.sql"))


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS))
    return ScriptDirectory.from_config(config)


def test_migrations_lead_to_the_tables(store):
    with store.database.read() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == SCHEMA
    assert scripts().get_heads() == [SCHEMA]


def test_migrations_lead_to_the_views(store):
    with store.database.read() as connection:
        found = inspect(connection)
        assert sorted(found.get_view_names()) == sorted(views.tables)
        for name, view in views.tables.items():
            assert [column["name"] for column in found.get_columns(name)] == list(view.columns.keys())


def test_migrations_can_be_written_for_postgresql():
    sql = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": sql}
    )
    with Operations.context(context):
        for script in reversed(list(scripts().walk_revisions())):
            script.module.upgrade()
    assert "BIGSERIAL" in sql.getvalue()
    assert "JSONB" in sql.getvalue()
    assert "CREATE VIEW trials" in sql.getvalue()


@pytest.mark.parametrize("dump", OLD, ids=lambda dump: dump.stem)
def test_every_old_schema_still_opens(tmp_path, dump):
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(dump.read_text())
    with open_results(path) as results:
        assert [trial.number for trial in results.trials("laptop")] == [0, 1, 2]
        best = results.front(("bits_per_byte", "decode_ms"), campaign="laptop")
        assert [trial.number for trial in best] == [1, 0]
        assert results.show(best[0].digest[:8]).profiles[0].timings[0].raw_ms == (1.0, 1.1, 1.3)
        assert results.status("laptop").spent_s == 90.0
        # What a schema did not have yet is unknown, not 0.
        copying = None if dump.stem == "0001" else 0.75
        assert best[1].figures.get("copying") == copying
        assert results.show(best[1].digest[:8]).evaluations[0][1].copying == copying
        selectivity = 0.375 if dump.stem >= "0003" else None
        assert best[1].figures.get("selectivity") == selectivity
        assert results.show(best[1].digest[:8]).evaluations[0][1].selectivity == selectivity
    with Store.open(path) as store:
        assert store.abandon_open_attempts(store.campaign("laptop").id) == 1


def test_every_schema_has_its_file():
    assert [dump.stem for dump in OLD] == sorted(script.revision for script in scripts().walk_revisions())


@pytest.fixture
def next_migration(tmp_path, monkeypatch):
    """Gives a function that makes one more migration of some lines of Python."""

    def add(*lines: str) -> None:
        folder = tmp_path / "migrations"
        shutil.copytree(schema.MIGRATIONS, folder)
        head = (
            f'from alembic import op\nrevision = "{NEXT}"\ndown_revision = "{SCHEMA}"\n\n\ndef upgrade():\n'
        )
        text = head + "".join(f"    {line}\n" for line in lines)
        (folder / "versions" / f"{NEXT}_next.py").write_text(text)
        monkeypatch.setattr(schema, "MIGRATIONS", folder)
        monkeypatch.setattr(schema, "SCHEMA", NEXT)

    return add


NEXT = f"{int(SCHEMA) + 1:04}"
ADD = 'op.execute("ALTER TABLE trial ADD COLUMN energy_j FLOAT")'


@pytest.mark.parametrize("mode", ["read", "write"])
def test_older_schema_is_copied_and_migrated(path, campaign, store, samples, next_migration, mode):
    samples.finish(store, campaign, 0, 2.0, 1.0)
    store.close()
    next_migration(ADD)
    copy = path.with_name(f"{path.name}.schema-{SCHEMA}")
    with Store.open(path, mode) as newer:
        assert newer.migration == Migration(name=str(path), before=SCHEMA, after=NEXT, copy=copy)
        assert [trial.number for trial in newer.trials(campaign)] == [0]
        with newer.database.read() as connection:
            assert "energy_j" in [column["name"] for column in inspect(connection).get_columns("trial")]
    with Store.open(path, mode) as again:
        assert again.migration is None
    with closing(sqlite3.connect(copy)) as old:
        assert old.execute("SELECT version_num FROM mixforge_schema").fetchall() == [(SCHEMA,)]
        assert old.execute("SELECT count(*) FROM trial").fetchall() == [(1,)]


def test_failed_migration_leaves_the_old_schema(path, campaign, store, samples, next_migration):
    samples.finish(store, campaign, 0, 2.0, 1.0)
    store.close()
    next_migration(ADD, "raise RuntimeError('the power went')")
    with pytest.raises(RuntimeError, match="power"):
        Store.open(path)
    with closing(sqlite3.connect(path)) as old:
        assert old.execute("SELECT version_num FROM mixforge_schema").fetchall() == [(SCHEMA,)]
        assert "energy_j" not in [row[1] for row in old.execute("PRAGMA table_info(trial)")]
        assert old.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_newer_schema_is_refused(path):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE mixforge_schema SET version_num = '0999'")
    with pytest.raises(StoreError, match=r"newer Mixforge \(schema 0999.*pip install -U"):
        Store.open(path)


def test_two_processes_create_one_database(tmp_path):
    script = (
        "import sys; from mixforge.db.store import Store; "
        "store = Store.open(sys.argv[1], 'create'); print(store.add_campaign('one', 'd', '', 1))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "new.db")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["1\n", "1\n"]
    assert [process.returncode for process in both] == [0, 0]
