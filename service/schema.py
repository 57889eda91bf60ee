"""Which schema a database has, and its way to this program's: migrations, under a lock, all or nothing. Knows no row.

The steps are in `service.migrations`. There is no way back down: what goes back is a backup.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from service.errors import ServiceError
from service.tables import metadata

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0001"
"""The newest revision in `service.migrations`; a test compares."""
BASELINE = "0001"
"""The schema of the first release."""

MIGRATIONS = Path(__file__).with_name("migrations")
_LOCK = 7007468
_stamps = sa.MetaData()
_stamp = sa.Table(
    "alembic_version",
    _stamps,
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
"""As Alembic makes it."""
_UNVERSIONED = "schema_version"
"""The table by which programs from before the first release knew their schema."""


class DatabaseSetupError(ServiceError):
    """The url is unusable, or the database cannot be brought to this program's schema; start-up stops."""


def bring_up(engine: Engine) -> None:
    """Make or migrate the schema. Who comes second waits for who came first and finds it done.

    An empty database gets today's tables at once: a test holds that the steps lead to the very same.

    Raises DatabaseSetupError for a database of a newer program or of none of ours; it is left as it was.
    """
    with engine.connect() as connection:
        if revision_of(connection) == HEAD:
            return
    with _locked(engine) as connection:
        _adopt(connection)
        found = revision_of(connection)
        if found == HEAD:
            return
        if found is None and not sa.inspect(connection).get_table_names():
            metadata.create_all(connection)
            _stamps.create_all(connection)
            connection.execute(_stamp.insert().values(version_num=HEAD))
            return
        _check_known(found)
        migrate(config_for(connection))


def revision_of(connection: Connection) -> str | None:
    """None for a database without a schema, or with one from before the first release."""
    if not sa.inspect(connection).has_table(_stamp.name):
        return None
    found: str | None = connection.execute(sa.select(_stamp.c.version_num)).scalar()
    return found


def migrate(config: Config, to: str = "head") -> None:
    from alembic import command  # it takes a fifth of a second, which a database that is up to date does not cost

    command.upgrade(config, to)


def config_for(connection: Connection) -> Config:
    """Alembic's."""
    from alembic.config import Config

    config = _located(Config())
    config.attributes["connection"] = connection
    return config


def _located(config: Config) -> Config:
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@contextmanager
def _locked(engine: Engine) -> Iterator[Connection]:
    """One transaction that nobody else's migration runs beside.

    SQLite changes a table by making it anew, and dropping the old one would delete what refers to it: foreign keys are
    not enforced meanwhile, and are checked before the commit.
    """
    if engine.dialect.name != "sqlite":
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            yield connection
        return
    with engine.connect().execution_options(sqlite_begin="IMMEDIATE") as connection:
        driver = connection.connection.dbapi_connection
        assert driver is not None
        driver.execute("PRAGMA foreign_keys=OFF")
        try:
            with connection.begin():
                yield connection
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                if broken:
                    raise DatabaseSetupError(f"The migration would have left {len(broken)} rows that refer to nothing.")
        finally:
            driver.execute("PRAGMA foreign_keys=ON")


def is_known(revision: str) -> bool:
    """Whether it is this program's schema, or one that leads to it."""
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    steps = ScriptDirectory.from_config(_located(Config())).walk_revisions()
    return revision in [step.revision for step in steps]


def _check_known(found: str | None) -> None:
    if found is not None and not is_known(found):
        raise DatabaseSetupError(
            f"The database has schema {found}, which this program does not know; it knows up to {HEAD}. A newer "
            "program wrote it: start that one, or restore a backup from before."
        )


def _adopt(connection: Connection) -> None:
    """A database of a program from before the first release that has the tables of the first one becomes one of it."""
    if revision_of(connection) is not None or not sa.inspect(connection).has_table(_UNVERSIONED):
        return
    version = connection.execute(sa.text(f"SELECT version FROM {_UNVERSIONED}")).scalar()
    differences = _differences(_columns(connection), _columns_of_baseline())
    if version != 1 or differences:
        named = ", ".join(differences[:5]) or f"its version is {version}"
        raise DatabaseSetupError(
            f"The database is of a program from before the first release, and differs from it: {named}. Point to "
            "another database."
        )
    from alembic import command

    connection.execute(sa.text(f"DROP TABLE {_UNVERSIONED}"))
    command.stamp(config_for(connection), BASELINE)


def _columns_of_baseline() -> set[tuple[str, str]]:
    engine = sa.create_engine("sqlite://")
    with engine.begin() as connection:
        migrate(config_for(connection), BASELINE)
        columns = _columns(connection)
    engine.dispose()
    return columns


def _columns(connection: Connection) -> set[tuple[str, str]]:
    inspector = sa.inspect(connection)
    tables = set(inspector.get_table_names()) - {_UNVERSIONED, _stamp.name}
    return {(table, column["name"]) for table in tables for column in inspector.get_columns(table)}


def _differences(found: set[tuple[str, str]], wanted: set[tuple[str, str]]) -> list[str]:
    missing = [f"no {table}.{column}" for table, column in sorted(wanted - found)]
    return [*missing, *(f"an unknown {table}.{column}" for table, column in sorted(found - wanted))]
