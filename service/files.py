"""Uploaded and produced files: a row each, content through fsspec. Knows no HTTP and no job logic.

A file that an unfinished job uses cannot be deleted, and does not expire before that job is done.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, cast

import sqlalchemy as sa
from fsspec.implementations.local import LocalFileSystem
from sqlalchemy.engine import Connection

from adapters.durable import write_file
from adapters.errors import StoreError
from adapters.storage import make_parents, open_storage, storage_errors, stored_files
from service.database import Database, Page, lock_tenant, new_id, page_of
from service.errors import ConflictError, InvalidRequestError, NotFoundError, TooLargeError, UnavailableError
from service.quotas import check_files
from service.tables import epoch_now, files, jobs

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 512 * 1024 * 1024
STORAGE_RETRY_SECONDS = 30.0


class FilePurpose(StrEnum):
    """Those of OpenAI's that mean something here; `fine-tune-results` is written by jobs only."""

    FINE_TUNE = "fine-tune"
    FINE_TUNE_RESULTS = "fine-tune-results"
    USER_DATA = "user_data"


@dataclass(frozen=True)
class File:
    id: str
    tenant_id: str
    filename: str
    purpose: FilePurpose
    bytes: int
    created_at: float
    expires_at: float | None
    sha256: str


@dataclass(frozen=True)
class StagedFile:
    """Content that is durable already, without a row yet: `JobQueue.succeed` inserts it in its transaction."""

    id: str
    tenant_id: str
    filename: str
    purpose: FilePurpose
    bytes: int
    sha256: str
    storage_key: str


class Files:
    def __init__(self, database: Database, storage_url: str, *, max_bytes: int = MAX_FILE_BYTES) -> None:
        """`storage_url` is an fsspec url or a local directory, for these files alone."""
        self._database = database
        self._filesystem, self._root = open_storage(storage_url)
        self.max_bytes = max_bytes

    def create(
        self,
        tenant_id: str,
        filename: str,
        purpose: FilePurpose,
        chunks: Iterable[bytes],
        *,
        expires_after_seconds: int | None = None,
    ) -> File:
        """Durable when it returns: content fsynced, row committed.

        Raises TooLargeError above `max_bytes`, QuotaExceededError above what the tenant may have.
        """
        self.remove_expired()
        with self._database.read() as connection:
            check_files(connection, tenant_id, 0)  # before anything is written
        staged = self.stage(tenant_id, filename, purpose, chunks)
        try:
            with self._database.begin() as connection:
                lock_tenant(connection, tenant_id)
                check_files(connection, tenant_id, staged.bytes)
                insert_file(connection, staged, expires_after_seconds=expires_after_seconds)
                return _get(connection, tenant_id, staged.id)
        except BaseException:
            self.discard([staged.storage_key])
            raise

    def stage(self, tenant_id: str, filename: str, purpose: FilePurpose, chunks: Iterable[bytes]) -> StagedFile:
        """Write the content durably; nobody sees the file before its row is inserted. Raises UnavailableError when the
        storage does not take it; then nothing of it is left there."""
        file_id = new_id("file")
        key = f"{tenant_id}/{file_id}"
        counted = _Counted(chunks, self.max_bytes)
        self._write(key, counted)
        return StagedFile(file_id, tenant_id, filename, purpose, counted.num_bytes, counted.sha256(), key)

    def list(
        self,
        tenant_id: str,
        *,
        purpose: FilePurpose | None = None,
        after: str | None = None,
        limit: int = 10000,
        newest_first: bool = True,
    ) -> Page[File]:
        query = _visible(tenant_id)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._database.read() as connection:
            rows, has_more = page_of(connection, query, files, after=after, limit=limit, descending=newest_first)
        return Page(tuple(_file(row) for row in rows), has_more)

    def get(self, tenant_id: str, file_id: str) -> File:
        with self._database.read() as connection:
            return _get(connection, tenant_id, file_id)

    def open(self, tenant_id: str, file_id: str) -> BinaryIO:
        """The content, for reading; the caller closes it."""
        query = _visible(tenant_id).where(files.c.id == file_id).with_only_columns(files.c.storage_key)
        with self._database.read() as connection:
            key = connection.execute(query).scalar()
        if key is None:
            raise _not_found(file_id)
        with storage_errors(f"opening file {file_id}"):
            return cast(BinaryIO, self._filesystem.open(self._path(key), "rb"))

    def delete(self, tenant_id: str, file_id: str) -> None:
        """Refused while an unfinished job uses it."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            _get(connection, tenant_id, file_id)
            job = connection.execute(sa.select(jobs.c.id).where(_used_by_unfinished(file_id))).scalars().first()
            if job is not None:
                raise ConflictError(
                    f"File '{file_id}' is used by the fine-tuning job '{job}': cancel the job or wait for its end.",
                    param="file_id",
                    code="file_in_use",
                )
            delete = files.delete().where(files.c.id == file_id).returning(files.c.storage_key)
            key = connection.execute(delete).scalar_one()
        self.discard([key])

    def remove_expired(self) -> int:
        """Delete what has expired (until then it is only hidden); how many files that were."""
        delete = files.delete().where(sa.not_(_alive())).returning(files.c.storage_key)
        with self._database.begin() as connection:
            keys = list(connection.execute(delete).scalars())
        self.discard(keys)
        return len(keys)

    def discard(self, storage_keys: Sequence[str]) -> None:
        """Remove content whose rows are gone, or never came."""
        with storage_errors("removing files"):
            for key in storage_keys:
                path = self._path(key)
                if self._filesystem.exists(path):
                    self._filesystem.rm_file(path)

    def stored(self) -> Iterator[tuple[str, float]]:
        """Storage keys of all content that is there, with rows or without, and when it was written (unix seconds)."""
        return stored_files(self._filesystem, self._root)

    def discard_all(self, tenant_id: str) -> None:
        """Remove the content of a deleted tenant's files, also of those that never got a row."""
        path = self._path(tenant_id)
        with storage_errors("removing files"):
            if self._filesystem.isdir(path):
                self._filesystem.rm(path, recursive=True)

    def _write(self, key: str, chunks: Iterable[bytes]) -> None:
        try:
            with storage_errors("writing a file"):
                if isinstance(self._filesystem, LocalFileSystem):
                    write_file(Path(self._path(key)), chunks)
                    return
                make_parents(self._filesystem, self._path(key))
                with self._filesystem.open(self._path(key), "wb") as stream:
                    for chunk in chunks:
                        stream.write(chunk)
        except BaseException as error:
            with suppress(StoreError):  # what it left is swept away later
                self.discard([key])
            if isinstance(error, StoreError):
                raise storage_unavailable(error) from error
            raise

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"


def storage_unavailable(error: OSError | StoreError) -> UnavailableError:
    """A full disk, one that fails, or a store that is away."""
    logger.error("files.not_stored", extra={"reason": str(error)})
    cause = error if isinstance(error, OSError) else error.__cause__
    told = cause.strerror if isinstance(cause, OSError) else None
    return UnavailableError(
        f"The file could not be stored ({told or type(cause).__name__}): try again later.",
        retry_after=STORAGE_RETRY_SECONDS,
        code="storage_unavailable",
    )


class _Counted:
    """Chunks on their way to disk: counted, hashed, and stopped at the limit."""

    def __init__(self, chunks: Iterable[bytes], max_bytes: int) -> None:
        self._chunks = chunks
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.num_bytes += len(chunk)
            if self.num_bytes > self._max_bytes:
                raise TooLargeError(f"The file is longer than {self._max_bytes} bytes.", param="file")
            self._hash.update(chunk)
            yield chunk

    def sha256(self) -> str:
        return self._hash.hexdigest()


def insert_file(connection: Connection, staged: StagedFile, *, expires_after_seconds: int | None = None) -> None:
    """Make a staged file visible, in the caller's transaction."""
    expires_at = None if expires_after_seconds is None else epoch_now() + expires_after_seconds
    connection.execute(files.insert().values(**staged.__dict__, created_at=epoch_now(), expires_at=expires_at))


def require_training_file(connection: Connection, tenant_id: str, file_id: str, *, param: str) -> None:
    """Raises InvalidRequestError naming `param` unless the tenant has this file, uploaded to fine-tune."""
    row = connection.execute(_visible(tenant_id).where(files.c.id == file_id)).one_or_none()
    code = f"invalid_{param.replace('.', '_')}"
    if row is None:
        raise InvalidRequestError(f"There is no file '{file_id}'.", param=param, code=code)
    if row.purpose != FilePurpose.FINE_TUNE:
        raise InvalidRequestError(
            f"File '{file_id}' has purpose '{row.purpose}': upload it with purpose 'fine-tune'.",
            param=param,
            code=code,
        )


def _visible(tenant_id: str) -> sa.Select[Any]:
    return sa.select(files).where(files.c.tenant_id == tenant_id, _alive())


def _alive() -> sa.ColumnElement[bool]:
    used = sa.exists().where(_used_by_unfinished(files.c.id))
    return sa.or_(files.c.expires_at.is_(None), files.c.expires_at > epoch_now(), used)


def _used_by_unfinished(file_id: str | sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    columns = (jobs.c.training_file, jobs.c.validation_file, jobs.c.evaluation_file)
    uses = sa.or_(*(column == file_id for column in columns))
    return sa.and_(uses, jobs.c.state.in_(("queued", "running")))


def _get(connection: Connection, tenant_id: str, file_id: str) -> File:
    row = connection.execute(_visible(tenant_id).where(files.c.id == file_id)).one_or_none()
    if row is None:
        raise _not_found(file_id)
    return _file(row)


def _not_found(file_id: str) -> NotFoundError:
    return NotFoundError(f"There is no file '{file_id}'.", param="file_id", code="file_not_found")


def _file(row: sa.Row[Any]) -> File:
    purpose = FilePurpose(row.purpose)
    return File(row.id, row.tenant_id, row.filename, purpose, row.bytes, row.created_at, row.expires_at, row.sha256)
