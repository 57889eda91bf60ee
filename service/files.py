"""Uploaded and produced files: a row each, content through fsspec. Knows no HTTP and no job logic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

from service.database import Database, Page

MAX_FILE_BYTES = 512 * 1024 * 1024


class FilePurpose(StrEnum):
    """OpenAI's; `fine-tune-results` is written by jobs only."""

    FINE_TUNE = "fine-tune"
    FINE_TUNE_RESULTS = "fine-tune-results"
    BATCH = "batch"
    USER_DATA = "user_data"
    EVALS = "evals"


@dataclass(frozen=True)
class File:
    id: str
    tenant_id: str
    filename: str
    purpose: FilePurpose
    bytes: int
    created_at: float
    expires_at: float | None


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
        """`storage_url` is an fsspec url or a local directory."""
        raise NotImplementedError

    def create(self, tenant_id: str, filename: str, purpose: FilePurpose, chunks: Iterable[bytes], *,
               expires_after_seconds: int | None = None) -> File:
        """Durable when it returns (content fsynced, row committed). Raises FileTooLarge above `max_bytes`."""
        raise NotImplementedError

    def stage(self, tenant_id: str, filename: str, purpose: FilePurpose, chunks: Iterable[bytes]) -> StagedFile:
        raise NotImplementedError

    def list(self, tenant_id: str, *, purpose: FilePurpose | None = None, after: str | None = None,
             limit: int = 10000, newest_first: bool = True) -> Page[File]:
        raise NotImplementedError

    def get(self, tenant_id: str, file_id: str) -> File:
        raise NotImplementedError

    def open(self, tenant_id: str, file_id: str) -> BinaryIO:
        """The content, for reading; the caller closes it."""
        raise NotImplementedError

    def delete(self, tenant_id: str, file_id: str) -> None:
        """Refused while an unfinished job uses it."""
        raise NotImplementedError

    def discard(self, storage_keys: Sequence[str]) -> None:
        """Remove content whose rows are gone (after a tenant was deleted)."""
        raise NotImplementedError
