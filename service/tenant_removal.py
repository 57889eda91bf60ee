"""Removing a tenant: its rows in one transaction, then what is left of it elsewhere, until nothing is. Knows no HTTP.

`service.tenant_inventory` lists the places. What lies outside the database is written down in `removals` by the
transaction that deletes the rows: a crash loses none of it, and every process on this database hears of it. A file, a
job or an answer of the tenant's may have been on its way, so all of it is done again for a while.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import sqlalchemy as sa
import structlog

from adapters.store import AdapterStore
from service.database import Database
from service.files import Files
from service.merges import Merges
from service.resume_points import ResumePoints
from service.tables import adapter_versions, epoch_now, removals
from service.tenants import LeftBehind, Tenants

if TYPE_CHECKING:
    from service.archive import Archive
    from service.drift import DriftWatch
    from service.engine.serving_engine import ServingEngine
    from service.metrics import Metrics

log = structlog.get_logger("service.tenant_removal")

SWEEP_SECONDS = 5.0
GRACE_SECONDS = 300.0
"""Longer than anything of a deleted tenant that was on its way: the lease of a worker that has vanished, an upload."""


class TenantRemoval:
    def __init__(
        self,
        database: Database,
        files: Files,
        store: AdapterStore,
        resume_points: ResumePoints,
        merges: Merges | None,
        *,
        retire: Callable[[str], None],
        forget: Sequence[Callable[[str], None]],
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        """`retire` frees a digest that nobody has any more; each of `forget` drops what this process keeps of a tenant
        in memory, and may be called again."""
        self._database = database
        self._tenants = Tenants(database)
        self._files = files
        self._store = store
        self._resume_points = resume_points
        self._merges = merges
        self._retire = retire
        self._forget = forget
        self._grace_seconds = grace_seconds
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def remove(self, tenant_id: str) -> bool:
        """Whether all of it is gone; otherwise only its rows are, and `sweep` goes on. Raises NotFoundError."""
        return self._erase(self._tenants.delete(tenant_id).left)

    def sweep(self) -> None:
        """What a crash has left, what other processes have deleted, and what came in late."""
        with self._database.read() as connection:
            old = (removals.c.removed_at < epoch_now() - self._grace_seconds).label("old")
            rows = connection.execute(sa.select(removals, old)).all()
        for row in rows:
            if self._erase(LeftBehind.of(row.tenant_id, row.left_behind)) and row.old:
                with self._database.begin() as connection:
                    connection.execute(removals.delete().where(removals.c.tenant_id == row.tenant_id))

    def _erase(self, left: LeftBehind) -> bool:
        with self._lock:
            is_news = left.tenant_id not in self._known
            self._known.add(left.tenant_id)
        unused = self._unused(left.digests)
        for forget in self._forget:
            forget(left.tenant_id)
        if is_news:
            for digest in unused:
                self._retire(digest)
        try:
            for digest in unused:
                self._store.delete(digest)
            for job_id in left.jobs:
                self._resume_points.discard(job_id)
            self._files.discard_all(left.tenant_id)
            if self._merges is not None:
                self._merges.discard(left.merges)
            return self._database.scrub()
        except Exception:  # the storage is away, say: the next sweep may fare better
            log.exception("tenant_not_erased", tenant=left.tenant_id)
            return False

    def _unused(self, digests: Sequence[str]) -> list[str]:
        """Of those that were the tenant's alone: another may have published the same bytes since."""
        query = sa.select(adapter_versions.c.digest).where(adapter_versions.c.digest.in_(digests))
        with self._database.read() as connection:
            used = set(connection.execute(query).scalars())
        return [digest for digest in digests if digest not in used]


class Forgetful(Protocol):
    """What keeps something of tenants in this process's memory, by their ids."""

    def forget(self, tenant_id: str) -> None: ...


def removal_in(
    archive: Archive,
    merges: Merges | None,
    engine: ServingEngine,
    metrics: Metrics,
    drift: DriftWatch | None,
    *forgetful: Forgetful,
) -> TenantRemoval:
    """Of everything that this process keeps."""
    forget = [engine.forget_tenant, *(one.forget for one in forgetful), metrics.forget_tenant]
    if drift is not None:
        forget.append(drift.forget_deleted)
    points = ResumePoints(archive.url)
    return TenantRemoval(
        archive.database, archive.files, archive.store, points, merges, retire=engine.retire, forget=forget
    )


@contextmanager
def sweeping(removal: TenantRemoval) -> Iterator[TenantRemoval]:
    """With a thread that sweeps, until the block ends."""
    stopping = threading.Event()

    def loop() -> None:
        while not stopping.wait(SWEEP_SECONDS):
            try:
                removal.sweep()
            except Exception:  # the database is away, say
                log.exception("tenant_sweep_failed")

    thread = threading.Thread(target=loop, name="tenant-removal", daemon=True)
    thread.start()
    try:
        yield removal
    finally:
        stopping.set()
        thread.join()
