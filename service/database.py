"""Tables and the one connection factory: SQLite in WAL mode, or Postgres by URL. Knows no job, tenant or file logic.

Leases are compared with the database's own clock (`epoch_now()`), so workers on several machines need no common time.
The schema is created when absent and refused when it is of another version.
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
from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, String, Table, Text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from service.errors import InvalidRequestError, NotFoundError, ServiceError

SCHEMA_VERSION = 1

Item = TypeVar("Item")

metadata = sa.MetaData()


def _tenant_column(**options: Any) -> Column[str]:
    return Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, **options)


schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("created_at", Float(53), nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    _tenant_column(index=True),
    Column("digest", String(64), nullable=False),
    Column("created_at", Float(53), nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(index=True),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", sa.BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("storage_key", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(),
    Column("spec", sa.JSON, nullable=False),
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("parent_digest", String(64)),
    Column("state", String(16), nullable=False),
    Column("files_validated", Boolean, nullable=False, default=False),
    Column("paused", Boolean, nullable=False, default=False),
    Column("attempt", Integer, nullable=False, default=0),
    Column("num_lost_leases", Integer, nullable=False, default=0),
    Column("worker", String(128)),
    Column("lease_renewed_at", Float(53)),
    Column("lease_expires_at", Float(53)),
    Column("created_at", Float(53), nullable=False),
    Column("finished_at", Float(53)),
    Column("estimated_finish", Float(53)),
    Column("trained_tokens", sa.BigInteger),
    Column("resolved", sa.JSON(none_as_null=True)),
    Column("resume_point", Text),
    Column("fine_tuned_model", Text),
    Column("result_files", sa.JSON, nullable=False, default=list),
    Column("error", sa.JSON(none_as_null=True)),
    Column("idempotency_key", Text),
    Column("request_digest", String(64), nullable=False),
    Index("jobs_by_tenant", "tenant_id", "seq"),
    Index("jobs_by_state", "state", "seq"),
    sqlite_autoincrement=True,
)

job_metadata = Table(
    "job_metadata",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
)

job_events = Table(
    "job_events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(8), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", sa.JSON(none_as_null=True)),
    Index("events_by_job", "job_id", "seq"),
    sqlite_autoincrement=True,
)

adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(512), nullable=False, unique=True),
    _tenant_column(index=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("base_model", Text, nullable=False),
    Column("base_fingerprint", Text, nullable=False),
    Column("checkpoint_id", String(64), unique=True),
    Column("step", Integer),
    Column("created_at", Float(53), nullable=False),
    Column("metrics", sa.JSON, nullable=False),
    sqlite_autoincrement=True,
)
"""Published versions, and checkpoints: those carry `checkpoint_id` and `step`."""

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    _tenant_column(),
    Column("alias", String(64), nullable=False),
    Column("model", String(512), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("previous", Integer),
    Column("created_at", Float(53), nullable=False),
    Index("moves_by_alias", "tenant_id", "alias", "seq"),
    sqlite_autoincrement=True,
)
"""Append-only; `previous` is the move that a rollback of this one returns to."""

aliases = Table(
    "aliases",
    metadata,
    _tenant_column(primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("move", ForeignKey("alias_moves.seq"), nullable=False),
)
"""The active pointer of each alias."""


class epoch_now(FunctionElement[float]):
    """Unix seconds by the database's clock, read when the statement runs (not when its transaction began)."""

    type = Float(53)
    inherit_cache = True


@compiles(epoch_now, "sqlite")
def _epoch_now_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(epoch_now, "postgresql")
def _epoch_now_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    return "CAST(extract(epoch from clock_timestamp()) AS double precision)"


class DatabaseSetupError(ServiceError):
    """The url is unusable, or another version of this service wrote the database; start-up stops."""


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

    @property
    def is_sqlite(self) -> bool:
        return self._is_sqlite

    def close(self) -> None:
        self._engine.dispose()


def connect(url: str) -> Database:
    """Open (and, when empty, create) the database at `sqlite:///path` or `postgresql://…`.

    Raises DatabaseSetupError when the url is neither or the schema is of another version.
    """
    engine = _postgres(url) if url.startswith("postgres") else _sqlite(url)
    database = Database(engine)
    try:
        _ensure_schema(database)
    except Exception:
        database.close()
        raise
    return database


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
    return sa.create_engine(f"{driver}://{rest}", pool_pre_ping=True, pool_size=10)


def _sqlite(url: str) -> Engine:
    if not url.startswith("sqlite:///") or url.endswith(":memory:") or url == "sqlite:///":
        raise DatabaseSetupError(f"'{url}' is no database url: use sqlite:///path or postgresql://…")
    Path(url.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, pool_size=10, max_overflow=30)
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite, not by the driver
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    mode = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
    connection.exec_driver_sql(f"BEGIN {mode}")


def _ensure_schema(database: Database) -> None:
    with database.begin() as connection:
        if not database.is_sqlite:  # two replicas may start at once
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7007468)")
        if not sa.inspect(connection).has_table(schema_version.name):
            metadata.create_all(connection)
            connection.execute(schema_version.insert().values(version=SCHEMA_VERSION))
            return
        found = connection.execute(sa.select(schema_version.c.version)).scalar()
        if found != SCHEMA_VERSION:
            raise DatabaseSetupError(
                f"The database has schema version {found}, this program needs {SCHEMA_VERSION}: "
                "start the version that wrote it, or point to another database."
            )
