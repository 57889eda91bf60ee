"""A copy of rows and artifacts from which a service starts again: taken while one runs, verified when it is put back.

    DEST/database.sqlite   the rows of one moment (not of a Postgres: `pg_dump` is its tool)
    DEST/storage/…         what those rows need, under the names it has in the storage
    DEST/backup.json       written last: every file above with its sha256 and size; without it there is no backup

Rows first, then what they need; what was deleted between the two makes a new round, with the rows of a later moment. So
the rows of a finished backup never name an artifact that it lacks. Knows no HTTP and no engine.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from adapters.durable import fsync_path, make_directories
from adapters.errors import AdapterNotFoundError, StoreError
from adapters.storage import make_parents, open_storage, storage_errors
from adapters.store import AdapterStore
from service.database import Database, connect
from service.errors import ServiceError
from service.references import References, references
from service.schema import HEAD, is_known

log = structlog.get_logger("service.backup")

FORMAT = 1
MANIFEST, DATABASE, STORAGE = "backup.json", "database.sqlite", "storage"
MAX_ROUNDS = 10
_PIECE_BYTES = 1024 * 1024


class BackupError(ServiceError):
    """It cannot be taken or put back; the message says why."""

    code = "backup_failed"


@dataclass(frozen=True)
class BackupReport:
    num_files: int
    num_bytes: int
    has_database: bool
    missing: tuple[str, ...] = ()
    """Of a restore: artifacts that rows of a database of its own name and the backup lacks."""


@dataclass(frozen=True)
class _File:
    sha256: str
    bytes: int


class _Gone(Exception):
    """What the rows name was deleted since."""


def take_backup(
    database: Database, database_url: str, storage_url: str, destination: str, store: AdapterStore
) -> BackupReport:
    """Into an empty place. Raises BackupError, StoreError."""
    target, place = open_storage(destination)
    with storage_errors("looking at the backup's place"):
        if target.exists(place) and target.find(place):
            raise BackupError(f"'{destination}' is not empty: a backup is never written over anything.")
    copies = _Copies(storage_url, target, f"{place}/{STORAGE}")
    for _ in range(MAX_ROUNDS):
        with tempfile.TemporaryDirectory(prefix="rootstock-backup-") as folder:
            snapshot = Path(folder) / DATABASE
            wanted = _snapshot(database, database_url, snapshot)
            try:
                names = _needed_files(wanted, store)
                for name, sha256 in names.items():
                    copies.add(name, sha256)
            except (_Gone, AdapterNotFoundError) as gone:
                log.info("backup_begins_another_round", reason=str(gone))
                continue
            copies.keep_only(names)
            files = {f"{STORAGE}/{name}": entry for name, entry in copies.done.items()}
            if snapshot.exists():
                files[DATABASE] = _put(target, snapshot, f"{place}/{DATABASE}")
            _write_manifest(target, place, files)
            return BackupReport(len(files), sum(file.bytes for file in files.values()), DATABASE in files)
    raise BackupError(f"Things were deleted during each of {MAX_ROUNDS} rounds: try again at a quieter time.")


def restore_backup(source: str, data_dir: Path, database_url: str, storage_url: str) -> BackupReport:
    """Into an empty data directory and storage. Everything is verified; the database appears last.

    Raises BackupError, StoreError; then what was copied may lie there, and no database beside it.
    """
    origin, place = open_storage(source)
    files = _read_manifest(origin, place, source)
    target, root = open_storage(storage_url)
    with storage_errors("looking at the place to restore to"):
        if (data_dir.exists() and any(data_dir.iterdir())) or (target.exists(root) and target.find(root)):
            raise BackupError(
                f"'{data_dir}' or the storage is not empty: a backup is only put back where nothing is. Name another "
                "--data-dir (and ROOTSTOCK_STORAGE_URL), or move away what is there."
            )
    sqlite = _sqlite_path(database_url)
    if DATABASE in files and sqlite is None:
        raise BackupError("The backup holds a SQLite database and ROOTSTOCK_DATABASE_URL names another kind.")
    if DATABASE in files and sqlite is not None and sqlite.exists():
        raise BackupError(f"There is a database at '{sqlite}' already.")
    make_directories(data_dir)
    for name, expected in files.items():
        if name != DATABASE:
            _restore_file(origin, f"{place}/{name}", target, f"{root}/{name.removeprefix(f'{STORAGE}/')}", expected)
    if DATABASE in files and sqlite is not None:
        _restore_database(origin, f"{place}/{DATABASE}", sqlite, files[DATABASE])
    missing = _missing(database_url, set(files))
    return BackupReport(len(files), sum(file.bytes for file in files.values()), DATABASE in files, missing)


# -- taking ---------------------------------------------------------------------------------------------------


def _snapshot(database: Database, url: str, path: Path) -> References:
    """The rows of one moment, as a file where they can be one; what they need."""
    if not database.is_sqlite:
        with database.read() as connection:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            return references(connection)
    source = _sqlite_path(url)
    assert source is not None
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(path)) as copy:
        live.backup(copy)
        copy.execute("DELETE FROM merges")  # merged models are not taken along: they are made again when asked for
        copy.commit()
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, whole by itself
    with closing(connect(f"sqlite:///{path}")) as frozen, frozen.read() as connection:
        found = references(connection)
    with closing(sqlite3.connect(path)) as copy:
        copy.execute("PRAGMA journal_mode=DELETE")
    return found


def _needed_files(wanted: References, store: AdapterStore) -> dict[str, str | None]:
    """Names in the storage, with their sha256 where it is known. What is damaged is left out and told. Raises _Gone."""
    names: dict[str, str | None] = {f"files/{key}": None for key in sorted(wanted.storage_keys)}
    names |= {f"training/{reference}": None for reference in sorted(wanted.resume_points)}
    for digest in sorted(wanted.digests):
        if not store.exists(digest):
            if store.is_quarantined(digest):
                log.error("backup_leaves_out_a_damaged_adapter", digest=digest)
                continue
            raise _Gone(digest)
        entries = store.manifest(digest)
        place = f"adapters/sha256/{digest}"
        names |= {f"{place}/{name}": entry["sha256"] for name, entry in sorted(entries.items())}
        names[f"{place}/manifest.json"] = digest
    return names


class _Copies:
    """Files on their way into the backup, hashed as they pass; each is copied once, unless it may change."""

    def __init__(self, storage_url: str, target: Any, place: str) -> None:
        self._source, self._root = open_storage(storage_url)
        self._target, self._place = target, place
        self.done: dict[str, _File] = {}

    def add(self, name: str, sha256: str | None) -> None:
        """Raises _Gone; BackupError when it is not what `sha256` says."""
        if name in self.done and not name.startswith("training/"):  # a job saves its state again under the same name
            return
        with storage_errors(f"copying {name}"):
            try:
                stream = self._source.open(f"{self._root}/{name}", "rb")
            except FileNotFoundError:
                raise _Gone(name) from None
            with stream:
                self.done[name] = _write(self._target, f"{self._place}/{name}", _pieces(stream))
        if sha256 not in (None, self.done[name].sha256):
            raise BackupError(f"'{name}' is damaged: let the service find and set aside what is, then try again.")

    def keep_only(self, names: Collection[str]) -> None:
        for name in self.done.keys() - set(names):
            with storage_errors(f"removing {name}"):
                self._target.rm_file(f"{self._place}/{name}")
            del self.done[name]


def _write_manifest(target: Any, place: str, files: Mapping[str, _File]) -> None:
    listed = {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in sorted(files.items())}
    facts = {"format": FORMAT, "schema": HEAD, "taken_at": time.time(), "files": listed}
    body = json.dumps(facts, indent=1, sort_keys=True).encode()
    sealed = {"sha256": hashlib.sha256(body).hexdigest(), "backup": facts}
    with storage_errors("finishing the backup"):
        _write(target, f"{place}/{MANIFEST}", iter([json.dumps(sealed, indent=1, sort_keys=True).encode()]))


# -- putting back ---------------------------------------------------------------------------------------------


def _read_manifest(origin: Any, place: str, told: str) -> dict[str, _File]:
    try:
        with storage_errors("reading the backup"), origin.open(f"{place}/{MANIFEST}", "rb") as stream:
            sealed = json.loads(stream.read())
        facts = sealed["backup"]
        body = json.dumps(facts, indent=1, sort_keys=True).encode()
        if hashlib.sha256(body).hexdigest() != sealed["sha256"]:
            raise BackupError(f"{MANIFEST} in '{told}' is damaged.")
        if facts["format"] != FORMAT or not is_known(facts["schema"]):
            raise BackupError(
                f"The backup is of format {facts['format']} and schema {facts['schema']}; this program knows format"
                f" {FORMAT} and schemas up to {HEAD}: restore it with the version that took it."
            )
        return {name: _File(entry["sha256"], entry["bytes"]) for name, entry in facts["files"].items()}
    except (StoreError, ValueError, KeyError, TypeError) as error:
        raise BackupError(f"'{told}' holds no finished backup: {MANIFEST} cannot be read.") from error


def _restore_file(origin: Any, source: str, target: Any, path: str, expected: _File) -> None:
    if ".." in path.split("/"):
        raise BackupError(f"'{source}' would lie outside the storage.")
    with storage_errors(f"restoring {source}"):
        try:
            with origin.open(source, "rb") as stream:
                found = _write(target, path, _pieces(stream))
        except FileNotFoundError:
            raise BackupError(f"'{source}' is missing in the backup.") from None
        if found != expected:
            target.rm_file(path)
            raise BackupError(f"'{source}' is not what was backed up.")


def _restore_database(origin: Any, source: str, path: Path, expected: _File) -> None:
    make_directories(path.parent)
    arriving = path.with_name(f".{path.name}.restoring")
    local, _ = open_storage(str(path.parent))
    try:
        _restore_file(origin, source, local, str(arriving), expected)
        with closing(sqlite3.connect(arriving)) as copy:
            if copy.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
                raise BackupError("The backup's database fails SQLite's own check.")
        fsync_path(arriving)
        arriving.rename(path)
        fsync_path(path.parent)
    finally:
        arriving.unlink(missing_ok=True)


def _missing(database_url: str, restored: set[str]) -> tuple[str, ...]:
    """Adapters and files that rows name and nobody restored."""
    with closing(connect(database_url)) as database, database.read() as connection:
        wanted = references(connection)
    names = {f"{STORAGE}/adapters/sha256/{digest}/manifest.json" for digest in wanted.digests}
    names |= {f"{STORAGE}/files/{key}" for key in wanted.storage_keys}
    return tuple(sorted(names - restored))


# -- bytes ----------------------------------------------------------------------------------------------------


def _pieces(stream: Any) -> Iterator[bytes]:
    read: Callable[[], bytes] = lambda: stream.read(_PIECE_BYTES)  # noqa: E731
    return iter(read, b"")


def _write(filesystem: Any, path: str, pieces: Iterator[bytes]) -> _File:
    counted, found = 0, hashlib.sha256()
    make_parents(filesystem, path)
    with filesystem.open(path, "wb") as out:
        for piece in pieces:
            counted += len(piece)
            found.update(piece)
            out.write(piece)
    if Path(path).is_file():
        fsync_path(Path(path))
    return _File(found.hexdigest(), counted)


def _put(filesystem: Any, path: Path, place: str) -> _File:
    with storage_errors(f"writing {path.name}"), path.open("rb") as stream:
        return _write(filesystem, place, _pieces(stream))


def _sqlite_path(url: str) -> Path | None:
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
