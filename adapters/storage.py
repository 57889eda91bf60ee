"""Opens an fsspec url, and tells what goes wrong there as one kind of error. Knows no adapter and no file's meaning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import fsspec

from adapters.errors import StoreError

CONNECT_SECONDS, READ_SECONDS, NUM_TRIES = 5, 30, 3
"""Of each call to a bucket: a load that fails is told within half a minute, and a waiting request learns why."""

_CLIENT_LIBRARIES = frozenset({"aiobotocore", "aiohttp", "botocore", "s3fs", "urllib3"})
"""Their errors are not all OSErrors."""


def open_storage(url: str) -> tuple[Any, str]:
    """The file system and the path of `url` in it, without a slash at its end.

    Listings are never remembered: other replicas write to the same place. Raises StoreError for a url that cannot be
    opened at all, without quoting it: credentials may stand in one.
    """
    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")):
        options["use_listings_cache"] = False
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"max_attempts": NUM_TRIES, "mode": "standard"},
        }
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        scheme = url.split("://", 1)[0]
        raise StoreError(f"'{scheme}://…' cannot be used as storage: {type(error).__name__}: {error}") from None
    return filesystem, root.rstrip("/")


def make_parents(filesystem: Any, path: str) -> None:
    """Folders for `path`, where there are such things. In a bucket there are none, and asked for one, the client would
    make the bucket: a misspelt name must fail instead."""
    if filesystem.protocol not in ("s3", ("s3", "s3a")):
        filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def stored_files(filesystem: Any, root: str) -> Iterator[tuple[str, float]]:
    """Every file under `root`, by its path from there, with when it was written (unix seconds)."""
    with storage_errors("listing files"):
        for path, facts in filesystem.find(root, detail=True).items():
            written = facts.get("mtime") or facts.get("LastModified") or facts.get("created")
            at = written.timestamp() if isinstance(written, datetime) else float(written)
            yield path.removeprefix(f"{root}/"), at


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """What the storage raises inside becomes a StoreError that names `action`. A missing file is the caller's to meet.

    Of a client library's own errors only the kind is told: their texts may quote what was sent.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(f"The storage failed while {action}: {_told(error)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENT_LIBRARIES:
            raise
        raise StoreError(f"The storage failed while {action}: {type(error).__name__}") from error


def _told(error: OSError) -> str:
    return str(error) or type(error).__name__
