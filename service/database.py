"""The one connection factory: SQLite in WAL mode, or Postgres by URL. Knows no job, tenant or file logic.

Leases are compared with the database's own clock (`epoch_now()`), so workers on several machines need no common time.
The schema is made when absent and brought up to date when it is older (`service.schema`).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy import Column, Table
from sqlalchemy.engine import Connection, Engine

from service.errors import InvalidRequestError, NotFoundError
from service.schema import DatabaseSetupError, bring_up
from service.tables import epoch_now, tenants

Item = TypeVar("Item")


AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
"""What a statement raises while the database cannot be reached, cannot write, or has no connection free: the same may
succeed a moment later."""


@dataclass(frozen=True)
class Page(Generic[Item]):
    """One page of a list; `has_more` when the next one is not empty."""

    items: tuple[Item, ...]
    has_more: bool


class Database:
    """Transactions: `begin()` to write, `read()` to look. Neither nests."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_sqlite = engine.dialect.name == "sqlite"
        # SQLite has one writer; waiting here is fair and prompt, waiting in its busy handler is polling.
        self._writer = threading.Lock()

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A write transaction: committed and durable after the block, rolled back when the block raises."""
        if not self._is_sqlite:
            with self._engine.begin() as connection:
                yield connection
            return
        with self._writer, self._engine.execution_options(sqlite_begin="IMMEDIATE").begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view; writes are not meant here."""
        with self._engine.connect() as connection:
            yield connection

    def scrub(self) -> bool:
        """Leave nothing of what was deleted in SQLite's files: its pages are overwritten when they are freed, and here
        the log of earlier writes is emptied. False while a reader needs the log. (Postgres: when it vacuums.)"""
        if not self._is_sqlite:
            return True
        with self._writer, self._engine.connect() as connection:
            driver = connection.connection.dbapi_connection
            assert driver is not None
            driver.execute("PRAGMA busy_timeout=1000")
            try:
                busy, _, _ = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                driver.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")
        return not busy

    @property
    def is_sqlite(self) -> bool:
        return self._is_sqlite

    def close(self) -> None:
        self._engine.dispose()


def connect(url: str) -> Database:
    """Open the database at `sqlite:///path` or `postgresql://…`, with this program's schema.

    Raises DatabaseSetupError when the url is neither, or the schema is a newer program's.
    """
    engine = open_engine(url)
    try:
        bring_up(engine)
    except AWAY as error:
        engine.dispose()
        raise DatabaseSetupError(f"The database cannot be used: {error.args[0]}") from error
    except Exception:
        engine.dispose()
        raise
    return Database(engine)


def open_engine(url: str) -> Engine:
    """As it is, whatever its schema."""
    return _postgres(url) if url.startswith("postgres") else _sqlite(url)


def new_id(prefix: str, *, num_characters: int = 24) -> str:
    """`{prefix}-` and random letters and digits; 24 of them carry 124 bits."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
    return f"{prefix}-" + "".join(secrets.choice(alphabet) for _ in range(num_characters))


def database_now(connection: Connection) -> float:
    """Unix seconds by the database's clock."""
    return float(connection.execute(sa.select(epoch_now())).scalar_one())


def lock_tenant(connection: Connection, tenant_id: str) -> str:
    """Serialize with whatever else decides about this tenant's things; the tenant's name. (SQLite: a plain read.)"""
    query = sa.select(tenants.c.name).where(tenants.c.id == tenant_id).with_for_update(key_share=True)
    name = connection.execute(query).scalar()
    if name is None:
        raise NotFoundError(f"No tenant '{tenant_id}'.")
    return str(name)


def page_of(
    connection: Connection,
    query: sa.Select[Any],
    table: Table,
    *,
    after: str | None,
    limit: int,
    descending: bool,
    id_column: Column[Any] | None = None,
) -> tuple[list[sa.Row[Any]], bool]:
    """The rows that follow the row with id `after`, in order of `table.c.seq`, and whether more follow."""
    if after is not None:
        named = (table.c.id if id_column is None else id_column) == after
        mark = connection.execute(query.with_only_columns(table.c.seq).where(named)).scalar()
        if mark is None:
            raise InvalidRequestError(f"There is no '{after}' in this list to go on after.", param="after")
        query = query.where(table.c.seq < mark if descending else table.c.seq > mark)
    order = table.c.seq.desc() if descending else table.c.seq.asc()
    rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
    return list(rows[:limit]), len(rows) > limit


def _postgres(url: str) -> Engine:
    scheme, rest = url.split("://", 1)
    driver = scheme if "+" in scheme else "postgresql+psycopg"
    return sa.create_engine(f"{driver}://{rest}", pool_pre_ping=True, pool_size=10, hide_parameters=True, **_PATIENCE)


_PATIENCE: dict[str, Any] = {"pool_timeout": 10.0, "connect_args": {"connect_timeout": 5}}
"""In seconds: a request is refused rather than kept waiting for a server that does not answer."""

_BUSY_MILLISECONDS = 30_000
_MAX_CONNECTIONS = 50
"""Kept open once they were needed: more than the threads that answer requests, since opening one takes milliseconds."""


def _sqlite(url: str) -> Engine:
    if not url.startswith("sqlite:///") or url.endswith(":memory:") or url == "sqlite:///":
        raise DatabaseSetupError(f"'{url}' is no database url: use sqlite:///path or postgresql://…")
    Path(url.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    # a failed statement is logged without its values: what tenants wrote is among them
    engine = sa.create_engine(url, pool_size=_MAX_CONNECTIONS, max_overflow=0, hide_parameters=True)
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite, not by the driver
    for pragma in (
        f"busy_timeout={_BUSY_MILLISECONDS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",  # what was deleted is not to be found in free pages
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    mode = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
    connection.exec_driver_sql(f"BEGIN {mode}")
