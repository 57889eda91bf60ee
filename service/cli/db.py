"""`rootstock db current|upgrade`: the database's schema, beside or before a running service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from service.cli.client import REFUSED, USAGE, console, fail
from service.config import PREFIX, Settings, SettingsError, load_settings

app = typer.Typer(help="Look at the database's schema, or bring it up to date.", no_args_is_help=True)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="As of `rootstock serve`; or ROOTSTOCK_DATA_DIR.", show_default=False)
]
"""A database URL may hold a password, so it is taken from the environment only: ROOTSTOCK_DATABASE_URL."""


@app.command("current")
def current(data_dir: DataDir = None) -> None:
    """Tell which schema the database has. Changes nothing; exit status 1 when it is not this program's."""
    from service.database import open_engine
    from service.schema import HEAD, revision_of

    settings = _settings(data_dir)
    _require_file(settings)
    engine = open_engine(settings.resolved_database_url)
    with engine.connect() as connection:
        found = revision_of(connection)
    engine.dispose()
    console.print(f"schema {found or 'none'}, this program's is {HEAD}")
    if found != HEAD:
        raise typer.Exit(REFUSED)


@app.command("upgrade")
def upgrade(data_dir: DataDir = None) -> None:
    """Make the schema, or bring it up to date: all of it or nothing. `rootstock serve` does the same when it starts."""
    from service.database import connect
    from service.errors import ServiceError
    from service.schema import HEAD

    try:
        connect(_settings(data_dir).resolved_database_url).close()
    except ServiceError as error:
        fail(error.message, REFUSED)
    console.print(f"schema {HEAD}")


def _settings(data_dir: Path | None) -> Settings:
    chosen = {} if data_dir is None else {"data_dir": data_dir}
    try:
        return load_settings(chosen)
    except SettingsError as error:
        fail(str(error), USAGE)


def _require_file(settings: Settings) -> None:
    """To look must not make one."""
    url = settings.resolved_database_url
    if url.startswith("sqlite:///") and not os.path.exists(url.removeprefix("sqlite:///")):
        fail(f"there is no database in {settings.data_dir}: see --data-dir and {PREFIX}DATABASE_URL", REFUSED)
