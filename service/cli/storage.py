"""`rootstock gc`, `backup` and `restore`: what an operator does with the data directory, beside the service or without.

They read the service's settings (--data-dir, ROOTSTOCK_DATABASE_URL, ROOTSTOCK_STORAGE_URL) and ask no service.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from service.cli.client import REFUSED, USAGE, console, fail
from service.config import Settings, SettingsError, load_settings

DataDir = Annotated[Path | None, typer.Option(file_okay=False, help="The service's own.")]


def gc(
    data_dir: DataDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove from the storage what no row needs and what is older than --gc-grace-hours of the service."""
    settings = _settings(data_dir)
    _require_database(settings)
    with _told_errors():
        from service.archive import Archive
        from service.garbage import Garbage
        from service.resume_points import ResumePoints

        with Archive.open(settings) as archive:
            points = ResumePoints(archive.url)
            grace = settings.gc_grace_hours * 3600.0
            garbage = Garbage(archive.database, archive.store, archive.files, points, grace_seconds=grace)
            swept = garbage.sweep(dry_run=dry_run)
    for one in swept:
        console.print(f"{one.kind} {one.name}")
    console.print(f"{len(swept)} {'would be removed' if dry_run else 'removed'}")


def backup(
    destination: Annotated[str, typer.Argument(help="An empty directory, or an fsspec URL such as s3://bucket/name.")],
    data_dir: DataDir = None,
) -> None:
    """Copy rows and artifacts, consistent with each other, while the service runs or not."""
    settings = _settings(data_dir)
    _require_database(settings)
    with _told_errors():
        from service.archive import Archive
        from service.backup import take_backup

        with Archive.open(settings) as archive:
            url = settings.resolved_database_url
            report = take_backup(archive.database, url, archive.url, destination, archive.store)
    console.print(f"{report.num_files} files, {report.num_bytes} bytes")
    if not report.has_database:
        console.print("without the database: take it with pg_dump, before the backup")


def restore(
    source: Annotated[str, typer.Argument(help="Where `rootstock backup` wrote to.")],
    data_dir: DataDir = None,
) -> None:
    """Put a backup back into an empty data directory and storage, verifying every byte."""
    settings = _settings(data_dir)
    with _told_errors():
        from service.backup import restore_backup

        report = restore_backup(
            source, settings.data_dir, settings.resolved_database_url, settings.resolved_storage_url
        )
    console.print(f"{report.num_files} files, {report.num_bytes} bytes")
    for name in report.missing:
        console.print(f"missing: {name}")
    if report.missing:
        fail(f"{len(report.missing)} artifacts that rows name are not in the backup", REFUSED)


def _settings(data_dir: Path | None) -> Settings:
    try:
        return load_settings({} if data_dir is None else {"data_dir": data_dir})
    except SettingsError as error:
        fail(str(error), USAGE)


def _require_database(settings: Settings) -> None:
    url = settings.resolved_database_url
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        fail(f"there is no database {url}: name the service's --data-dir", USAGE)


@contextmanager
def _told_errors() -> Iterator[None]:
    from adapters.errors import AdapterError
    from service.errors import ServiceError

    try:
        yield
    except (AdapterError, ServiceError) as error:
        fail(error.message, REFUSED)
