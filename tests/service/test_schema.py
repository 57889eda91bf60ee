"""The schema's steps: they lead to the tables of this program, from every released schema, all or nothing."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from typer.testing import CliRunner

from service import schema
from service.cli import app
from service.database import connect, open_engine
from service.schema import BASELINE, HEAD, MIGRATIONS, DatabaseSetupError, config_for, migrate, revision_of
from service.tables import metadata, tenants
from tests.filled_database import fill, rows

DUMP = Path(__file__).with_name(f"schema_{BASELINE}.sql")


@pytest.fixture
def empty_url(request: pytest.FixtureRequest, database_url: str) -> Iterator[str]:
    """On Postgres too a database without any table."""
    if not database_url.startswith("postgres"):
        yield database_url
        return
    name = "test_schema"
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(f"CREATE DATABASE {name}")
    yield sa.make_url(database_url).set(database=name).render_as_string(hide_password=False)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def restored(path: Path) -> str:
    """A database of the first release, with a row in every table."""
    with sqlite3.connect(path) as opened:
        opened.executescript(DUMP.read_text())
    return f"sqlite:///{path}"


def test_the_steps_lead_to_the_tables_of_this_program(empty_url: str) -> None:
    engine = open_engine(empty_url)
    with engine.begin() as connection:
        migrate(config_for(connection))
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert revision_of(connection) == HEAD
        head = ScriptDirectory.from_config(config_for(connection)).get_current_head()
    engine.dispose()
    assert head == HEAD, "service.schema.HEAD is not the newest step"


def _definitions(path: Path) -> dict[str, str | None]:
    """Every table and index as it was defined, whatever the order of a table's constraints."""
    with sqlite3.connect(path) as opened:
        found = dict(opened.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall())
    return {name: "".join(sorted(re.findall(r"\w+|[^\w\s]", sql or ""))) for name, sql in found.items()}


def test_an_empty_database_gets_the_very_tables_that_the_steps_lead_to(tmp_path: Path) -> None:
    connect(f"sqlite:///{tmp_path / 'at_once.db'}").close()
    engine = open_engine(f"sqlite:///{tmp_path / 'by_steps.db'}")
    with engine.begin() as connection:
        migrate(config_for(connection))
    engine.dispose()
    at_once, by_steps = _definitions(tmp_path / "at_once.db"), _definitions(tmp_path / "by_steps.db")
    assert len(at_once) > 40 and at_once == by_steps


def test_a_database_of_the_first_release_keeps_every_row(tmp_path: Path) -> None:
    url = restored(tmp_path / "old.db")
    engine = open_engine(url)
    with engine.connect() as connection:
        before = {
            table: connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
            for table in sa.inspect(connection).get_table_names()
        }
    engine.dispose()
    assert len(before) > 25 and set(before.values()) == {1}
    database = connect(url)
    with database.read() as connection:
        assert revision_of(connection) == HEAD
        after = {table.name: rows(connection, table) for table in metadata.sorted_tables}
    database.close()
    assert {name: len(found) for name, found in after.items()} == {**dict.fromkeys(after, 1)}
    assert after["captures"][0]["prompt"] == {"text": ["some-prompt"]}


def test_a_database_of_a_newer_program_is_refused_and_left_as_it_is(empty_url: str) -> None:
    connect(empty_url).close()
    engine = open_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseSetupError, match=r"schema 9999, which this program does not know; .* newer program"):
        connect(empty_url)
    with engine.connect() as connection:
        assert revision_of(connection) == "9999"
    engine.dispose()


def _as_before_the_first_release(url: str) -> sa.Engine:
    engine = open_engine(url)
    with engine.begin() as connection:
        metadata.create_all(connection)
        connection.execute(sa.text("CREATE TABLE schema_version (version INTEGER PRIMARY KEY)"))
        connection.execute(sa.text("INSERT INTO schema_version VALUES (1)"))
        connection.execute(tenants.insert().values(id="t", name="acme", created_at=1.0))
    return engine


def test_a_database_from_before_the_first_release_with_its_tables_is_taken_over(empty_url: str) -> None:
    engine = _as_before_the_first_release(empty_url)
    database = connect(empty_url)
    with database.read() as connection:
        assert revision_of(connection) == HEAD
        assert connection.execute(sa.select(tenants.c.name)).scalars().all() == ["acme"]
        assert not sa.inspect(connection).has_table("schema_version")
    database.close()
    engine.dispose()


def test_one_with_other_tables_is_refused_by_their_names(empty_url: str) -> None:
    engine = _as_before_the_first_release(empty_url)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE merges DROP COLUMN report"))
        connection.execute(sa.text("ALTER TABLE files ADD COLUMN colour TEXT"))
    with pytest.raises(DatabaseSetupError, match=r"no merges\.report, an unknown files\.colour"):
        connect(empty_url)
    with engine.connect() as connection:
        assert sa.inspect(connection).has_table("schema_version") and revision_of(connection) is None
    engine.dispose()


STEP = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "{revision}", "{before}"

def upgrade() -> None:
    {body}
"""


def _with_step(directory: Path, revision: str, before: str, body: str) -> None:
    """A copy of the steps with one more, as a later program has it."""
    versions = directory / "versions"
    if not versions.exists():
        versions.mkdir(parents=True)
        (directory / "env.py").write_text((MIGRATIONS / "env.py").read_text())
        for step in (MIGRATIONS / "versions").glob("*.py"):
            (versions / step.name).write_text(step.read_text())
    (versions / f"{revision}.py").write_text(STEP.format(revision=revision, before=before, body=body))


def test_a_migration_that_fails_leaves_the_old_schema_whole(
    empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = connect(empty_url)
    with database.begin() as connection:
        fill(connection, "tenant-1", "some")
    database.close()
    directory = tmp_path / "migrations"
    _with_step(directory, "9001", HEAD, "op.add_column('tenants', sa.Column('colour', sa.Text()))")
    _with_step(directory, "9002", "9001", "op.drop_table('captures'); op.execute('SELECT * FROM nowhere')")
    monkeypatch.setattr(schema, "MIGRATIONS", directory)
    monkeypatch.setattr(schema, "HEAD", "9002")
    with pytest.raises((sa.exc.DBAPIError, DatabaseSetupError), match="nowhere"):
        connect(empty_url)
    monkeypatch.undo()
    database = connect(empty_url)
    with database.read() as connection:
        assert revision_of(connection) == HEAD
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert all(len(rows(connection, table)) == 1 for table in metadata.sorted_tables)
    database.close()


def test_making_a_table_anew_deletes_nothing_that_refers_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite drops the old table, and with foreign keys enforced everything of every tenant went with it."""
    url = restored(tmp_path / "old.db")
    directory = tmp_path / "migrations"
    body = "with op.batch_alter_table('tenants') as tenants: tenants.drop_column('created_at')"
    _with_step(directory, "9001", BASELINE, body)
    monkeypatch.setattr(schema, "MIGRATIONS", directory)
    monkeypatch.setattr(schema, "HEAD", "9001")
    database = connect(url)
    with database.begin() as connection:
        assert revision_of(connection) == "9001"
        left = {
            table: connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
            for table in sa.inspect(connection).get_table_names()
        }
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
    database.close()
    assert set(left.values()) == {1}


START = "import sys; from service.database import connect; connect(sys.argv[1]).close(); print('up')"


def test_two_processes_that_start_at_once_make_one_schema(empty_url: str) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", START, empty_url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=60) for process in started]
    assert [output.strip() for output, _ in ended] == [b"up", b"up"], ended


def test_the_steps_are_in_the_package() -> None:
    from hatchling.builders.wheel import WheelBuilder

    root = Path(__file__).resolve().parent.parent.parent
    paths = {file.distribution_path for file in WheelBuilder(str(root)).recurse_included_files()}
    steps = {str(path.relative_to(root)) for path in MIGRATIONS.rglob("*.py") if "__pycache__" not in path.parts}
    assert len(steps) >= 3 and steps <= paths


def test_a_later_step_is_reached_one_by_one(tmp_path: Path) -> None:
    """`migrate` goes to the step that it is told."""
    engine = open_engine(f"sqlite:///{tmp_path / 'new.db'}")
    with engine.begin() as connection:
        migrate(config_for(connection), BASELINE)
        assert revision_of(connection) == BASELINE
    engine.dispose()


def test_the_command_line_tells_the_schema_and_brings_it_up(
    tmp_path: Path,
) -> None:
    def run(*words: str) -> int:
        return CliRunner().invoke(app, [*words, f"--data-dir={tmp_path}"]).exit_code

    assert run("db", "current") == 1 and not (tmp_path / "rootstock.db").exists()
    assert run("db", "upgrade") == 0
    assert run("db", "current") == 0
    with sqlite3.connect(tmp_path / "rootstock.db") as opened:
        opened.execute("UPDATE alembic_version SET version_num = '9999'")
    assert run("db", "current") == 1 and run("db", "upgrade") == 1
