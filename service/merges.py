"""Merged models as rows and directories: who asked, how far it is, how long it is kept. Knows no tensors and no HTTP.

A row is claimed with a lease, like a fine-tuning job: after a crash it is tried again, at most three times. The
directory `{merged}/{id}` is there for readers once the row says `succeeded`; directories without a row are swept away.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.config import Settings
from service.database import Database, lock_tenant, new_id
from service.engine.base_description import BaseDescription
from service.errors import ConflictError, NotFoundError
from service.tables import epoch_now, merges
from service.versions import AdapterVersion

LEASE_SECONDS = 60.0
MAX_ATTEMPTS = 3


class MergeState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True)
class Merge:
    """One row. `bytes` is an estimate until it has succeeded."""

    id: str
    tenant_id: str
    model: str
    digest: str
    state: MergeState
    attempt: int
    bytes: int
    report: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    created_at: float
    finished_at: float | None
    expires_at: float | None


class MergeGoneError(Exception):
    """The row was deleted or claimed again: whoever works on it stops."""


class Merges:
    def __init__(self, database: Database, directory: Path, *, max_bytes: int, ttl_seconds: float) -> None:
        """`directory` is on a local disk; all merged models together take at most `max_bytes` there."""
        self._database = database
        self._directory = directory
        self._max_bytes = max_bytes
        self._ttl_seconds = ttl_seconds

    def create(self, tenant_id: str, version: AdapterVersion, num_bytes: int) -> Merge:
        """Queue a merge of about `num_bytes`, or answer the one of the same adapter that is there.

        Raises ConflictError while another merge of the tenant is unfinished, or when the disk's share is full.
        """
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            mine = sa.and_(merges.c.tenant_id == tenant_id, _kept())
            twin = sa.and_(merges.c.digest == version.digest, merges.c.state != MergeState.FAILED)
            row = connection.execute(sa.select(merges).where(mine, twin).limit(1)).one_or_none()
            if row is not None:
                return _merge(row)
            unfinished = connection.execute(sa.select(merges.c.id).where(mine, _unfinished()).limit(1)).scalar()
            if unfinished is not None:
                raise ConflictError(
                    f"The merge '{unfinished}' is not finished: wait for it, or delete it.", code="merge_unfinished"
                )
            self._check_room(connection, num_bytes)
            merge_id = new_id("merge")
            values = {
                "id": merge_id,
                "tenant_id": tenant_id,
                "model": version.id,
                "digest": version.digest,
                "state": MergeState.QUEUED,
                "bytes": num_bytes,
                "created_at": epoch_now(),
            }
            connection.execute(merges.insert().values(**values))
            return _get(connection, tenant_id, merge_id)

    def list(self, tenant_id: str) -> list[Merge]:
        """Newest first."""
        query = sa.select(merges).where(merges.c.tenant_id == tenant_id, _kept()).order_by(merges.c.seq.desc())
        with self._database.read() as connection:
            return [_merge(row) for row in connection.execute(query)]

    def get(self, tenant_id: str, merge_id: str) -> Merge:
        with self._database.read() as connection:
            return _get(connection, tenant_id, merge_id)

    def delete(self, tenant_id: str, merge_id: str) -> None:
        """Gone at once for the tenant; a worker on it stops, and the directory is swept away."""
        with self._database.begin() as connection:
            merge = _get(connection, tenant_id, merge_id)
            connection.execute(merges.delete().where(merges.c.id == merge.id))
        shutil.rmtree(self.directory(merge), ignore_errors=True)

    def discard(self, merge_ids: Iterable[str]) -> None:
        """The directories of merges whose rows are gone."""
        for merge_id in merge_ids:
            shutil.rmtree(self._directory / merge_id, ignore_errors=True)

    def directory(self, merge: Merge) -> Path:
        return self._directory / merge.id

    # -- the worker's side ------------------------------------------------------------------------------------

    def claim(self) -> Merge | None:
        """The oldest that is queued, or whose worker has vanished; its directory is empty then."""
        orphaned = sa.and_(merges.c.state == MergeState.RUNNING, merges.c.lease_expires_at < epoch_now())
        waiting = sa.or_(merges.c.state == MergeState.QUEUED, orphaned)
        query = sa.select(merges).where(waiting).order_by(merges.c.seq).limit(1)
        with self._database.read() as connection:  # mostly there is nothing: no need to hold up writers
            if connection.execute(query).one_or_none() is None:
                return None
        with self._database.begin() as connection:
            row = connection.execute(query.with_for_update(skip_locked=True)).one_or_none()
            if row is None:
                return None
            if row.attempt >= MAX_ATTEMPTS:
                lost = {"code": "worker_lost", "message": f"The service ended {row.attempt} times while it merged."}
                _update(connection, row.id, **self._ended(MergeState.FAILED), bytes=0, error=lost)
                return None
            attempt = row.attempt + 1
            _update(connection, row.id, state=MergeState.RUNNING, attempt=attempt, lease_expires_at=_lease())
            claimed = _merge(connection.execute(sa.select(merges).where(merges.c.id == row.id)).one())
        shutil.rmtree(self.directory(claimed), ignore_errors=True)
        self.directory(claimed).mkdir(parents=True)
        return claimed

    def renew(self, merge: Merge) -> None:
        """Raises MergeGoneError."""
        self._write(merge, lease_expires_at=_lease())

    def release(self, merge: Merge) -> None:
        """The service ends; the next one begins anew, and this attempt does not count."""
        self._write(merge, state=MergeState.QUEUED, attempt=merge.attempt - 1, lease_expires_at=None)

    def succeed(self, merge: Merge, *, num_bytes: int, report: Mapping[str, Any]) -> None:
        """What lies in the directory is durable already."""
        self._write(merge, **self._ended(MergeState.SUCCEEDED), bytes=num_bytes, report=dict(report))

    def fail(self, merge: Merge, *, code: str, message: str) -> None:
        self._write(merge, **self._ended(MergeState.FAILED), bytes=0, error={"code": code, "message": message})

    def sweep(self) -> None:
        """Remove what has expired, and directories that no row speaks of (a tenant was deleted, a crash came)."""
        with self._database.begin() as connection:
            connection.execute(merges.delete().where(sa.not_(_kept())))
        if not self._directory.is_dir():
            return
        found = {path.name for path in self._directory.iterdir()}
        holding = sa.select(merges.c.id).where(merges.c.state.in_((MergeState.RUNNING, MergeState.SUCCEEDED)))
        with self._database.read() as connection:
            known = set(connection.execute(holding).scalars())
        for name in found - known:
            shutil.rmtree(self._directory / name, ignore_errors=True)

    def _check_room(self, connection: Connection, num_bytes: int) -> None:
        taken = connection.execute(
            sa.select(sa.func.coalesce(sa.func.sum(merges.c.bytes), 0)).where(_kept())
        ).scalar_one()
        if taken + num_bytes > self._max_bytes:
            raise ConflictError(
                f"A merged model takes about {num_bytes} bytes; {max(0, self._max_bytes - taken)} of"
                f" {self._max_bytes} are free. Delete one of your merges, or wait until one expires.",
                code="merge_disk_full",
            )

    def _write(self, merge: Merge, **values: Any) -> None:
        fence = sa.and_(
            merges.c.id == merge.id, merges.c.attempt == merge.attempt, merges.c.state == MergeState.RUNNING
        )
        with self._database.begin() as connection:
            if connection.execute(merges.update().where(fence).values(**values)).rowcount == 0:
                raise MergeGoneError(merge.id)

    def _ended(self, state: MergeState) -> dict[str, Any]:
        expires_at = epoch_now() + self._ttl_seconds
        return {"state": state, "lease_expires_at": None, "finished_at": epoch_now(), "expires_at": expires_at}


def merged_bytes(base: BaseDescription) -> int:
    """About what the weights of a merged model take, at most."""
    linear = sum(shape.in_features * shape.out_features for shape in base.signature.modules.values())
    others = sum(prod(tensor.shape) for tensor in base.signature.embeddings.values())
    return (linear + others) * (4 if base.quantization == "none" else 2)


def merges_in(settings: Settings, database: Database) -> Merges | None:
    """None where merging is turned off."""
    if not settings.merge_bytes:
        return None
    directory, ttl_seconds = settings.data_dir / "merged", settings.merge_seconds
    return Merges(database, directory, max_bytes=settings.merge_bytes, ttl_seconds=ttl_seconds)


def _lease() -> sa.ColumnElement[float]:
    return epoch_now() + LEASE_SECONDS


def _kept() -> sa.ColumnElement[bool]:
    return sa.or_(merges.c.expires_at.is_(None), merges.c.expires_at > epoch_now())


def _unfinished() -> sa.ColumnElement[bool]:
    return merges.c.state.in_((MergeState.QUEUED, MergeState.RUNNING))


def _update(connection: Connection, merge_id: str, **values: Any) -> None:
    connection.execute(merges.update().where(merges.c.id == merge_id).values(**values))


def _get(connection: Connection, tenant_id: str, merge_id: str) -> Merge:
    query = sa.select(merges).where(merges.c.tenant_id == tenant_id, merges.c.id == merge_id, _kept())
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no merge '{merge_id}'.", param="merge_id", code="merge_not_found")
    return _merge(row)


def _merge(row: sa.Row[Any]) -> Merge:
    return Merge(
        id=row.id,
        tenant_id=row.tenant_id,
        model=row.model,
        digest=row.digest,
        state=MergeState(row.state),
        attempt=row.attempt,
        bytes=row.bytes,
        report=row.report,
        error=row.error,
        created_at=row.created_at,
        finished_at=row.finished_at,
        expires_at=row.expires_at,
    )
