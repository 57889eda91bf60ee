"""The database layer: schema, transactions, clock, paging; on SQLite and Postgres."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.database import Database, connect, database_now, new_id, page_of
from service.errors import InvalidRequestError
from service.schema import DatabaseSetupError
from service.tables import files, tenants


def _insert_tenant(database: Database, name: str) -> None:
    with database.begin() as connection:
        connection.execute(tenants.insert().values(id=new_id("tenant"), name=name, created_at=0.0))


def _names(database: Database) -> set[str]:
    with database.read() as connection:
        return set(connection.execute(sa.select(tenants.c.name)).scalars())


def test_what_was_written_is_there_after_opening_again(database: Database, database_url: str) -> None:
    _insert_tenant(database, "acme")
    database.close()
    again = connect(database_url)
    assert _names(again) == {"acme"}
    again.close()


def test_a_block_that_raises_leaves_nothing_written(database: Database) -> None:
    with pytest.raises(RuntimeError), database.begin() as connection:
        connection.execute(tenants.insert().values(id="t", name="acme", created_at=0.0))
        raise RuntimeError
    assert _names(database) == set()


def test_a_url_that_is_no_supported_database_is_refused() -> None:
    for url in ("mysql://x/y", "sqlite://", "sqlite:///:memory:", "/some/path"):
        with pytest.raises(DatabaseSetupError, match="no database url"):
            connect(url)


def test_the_clock_is_unix_time_and_moves_on_within_a_transaction(database: Database) -> None:
    with database.begin() as connection:
        first = database_now(connection)
        deadline = time.monotonic() + 10
        while (second := database_now(connection)) == first:
            assert time.monotonic() < deadline
    assert second > first
    assert abs(first - time.time()) < 60


def test_many_writers_at_once_lose_nothing(database: Database) -> None:
    threads = [threading.Thread(target=_insert_tenant, args=(database, f"t{number}")) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(_names(database)) == 16


def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:
    with database.begin() as connection:
        connection.execute(tenants.insert().values(id="t", name="acme", created_at=0.0))
        assert _names(database) == set()
    assert _names(database) == {"acme"}


def test_sqlite_syncs_every_commit_and_enforces_foreign_keys(tmp_path: Path) -> None:
    database = connect(f"sqlite:///{tmp_path}/nested/rootstock.db")
    with database.read() as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    database.close()
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}


def test_pages_follow_each_other_without_gap_or_overlap(database: Database) -> None:
    _insert_tenant(database, "acme")
    with database.begin() as connection:
        owner = connection.execute(sa.select(tenants.c.id)).scalar_one()
        for number in range(7):
            row = {"id": f"file-{number}", "tenant_id": owner, "filename": "f", "purpose": "fine-tune", "bytes": 0}
            connection.execute(files.insert().values(**row, sha256="", storage_key="", created_at=0.0))
    seen: list[str] = []
    with database.read() as connection:
        after = None
        while True:
            rows, has_more = page_of(connection, sa.select(files), files, after=after, limit=3, descending=True)
            seen += [row.id for row in rows]
            after = seen[-1]
            if not has_more:
                break
        assert seen == [f"file-{number}" for number in reversed(range(7))]
        with pytest.raises(InvalidRequestError) as caught:
            page_of(connection, sa.select(files), files, after="file-none", limit=3, descending=True)
    assert caught.value.param == "after"


def test_two_processes_that_read_before_they_write_both_get_through(database: Database, database_url: str) -> None:
    other = connect(database_url)  # another process has locks of its own, as this second handle has
    thread = threading.Thread(target=_insert_tenant, args=(other, "second"))
    with database.begin() as connection:
        assert connection.execute(sa.select(tenants)).all() == []
        thread.start()
        thread.join(0.3)  # on SQLite it waits for us; had it not to, our snapshot would be stale by now
        connection.execute(tenants.insert().values(id="t", name="first", created_at=0.0))
    thread.join()
    assert _names(database) == {"first", "second"}
    other.close()
