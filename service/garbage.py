"""Removes from the storage what no row needs: deleted models, dead publishers' leftovers, orphan files and states.

First the storage is listed, then the rows are asked, so what was listed and got its row meanwhile is kept. Only what is
older than a grace is taken: a publisher between its upload and its row is younger. Each adapter is removed in a
transaction in which no row can come to need it (`references.hold_new_references`), after another look at rows and age.
Several services may sweep one storage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import structlog

from adapters.errors import AdapterError
from adapters.store import AdapterStore
from service.database import Database
from service.files import Files
from service.references import References, hold_new_references, needed, references
from service.resume_points import ResumePoints

log = structlog.get_logger("service.garbage")

QUARANTINE_SECONDS = 30 * 86400.0
"""How long damaged bytes are kept for whoever wants to know why."""


@dataclass(frozen=True)
class Swept:
    """`kind` is adapter, temporary, unfinished, quarantined, cached, file or training_state."""

    kind: str
    name: str


class Garbage:
    def __init__(
        self,
        database: Database,
        store: AdapterStore,
        files: Files,
        resume_points: ResumePoints,
        *,
        grace_seconds: float,
        in_use: Callable[[], Collection[str]] = frozenset,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`in_use`: adapters that requests in flight wait for or run on, whatever rows say."""
        self._database = database
        self._store = store
        self._files = files
        self._resume_points = resume_points
        self._grace_seconds = grace_seconds
        self._in_use = in_use
        self._clock = clock

    def sweep(self, *, dry_run: bool = False) -> list[Swept]:
        """What was removed, or would be. Raises StoreError when the storage does not answer."""
        listed = list(self._old())
        with self._database.read() as connection:
            kept = references(connection)
        found = [(swept, remove) for swept, remove in listed if not self._is_kept(swept, kept)]
        if dry_run:
            return [swept for swept, _ in found]
        done = []
        for swept, remove in found:
            try:
                removed = remove()
            except AdapterError as error:
                log.warning("sweep_failed", kind=swept.kind, name=swept.name, reason=error.message)
                continue
            if removed is not False:
                log.info("swept", kind=swept.kind, name=swept.name)
                done.append(swept)
        return done

    def _old(self) -> Iterator[tuple[Swept, Callable[[], bool | None]]]:
        """Everything in the storage that is older than the grace, and how it is removed."""
        for digest in self._store.digests():
            if self._is_old(self._store.modified_at(digest)):
                yield Swept("adapter", digest), partial(self._remove_adapter, digest)
        for leftover in self._store.leftovers():
            grace = QUARANTINE_SECONDS if leftover.kind == "quarantined" else self._grace_seconds
            if leftover.modified_at < self._clock() - grace:
                yield Swept(leftover.kind, leftover.path.rsplit("/", 1)[-1]), partial(self._store.remove, leftover)
        for key, modified_at in self._files.stored():
            if self._is_old(modified_at):
                yield Swept("file", key), partial(self._files.discard, [key])
        for job_id, modified_at in self._resume_points.stored():
            if self._is_old(modified_at):
                yield Swept("training_state", job_id), partial(self._resume_points.discard, job_id)

    def _is_old(self, modified_at: float | None) -> bool:
        return modified_at is not None and modified_at < self._clock() - self._grace_seconds

    def _is_kept(self, swept: Swept, kept: References) -> bool:
        if swept.kind == "adapter":
            return swept.name in kept.digests or swept.name in self._in_use()
        if swept.kind == "file":
            return swept.name in kept.storage_keys
        return swept.kind == "training_state" and swept.name in kept.unfinished_jobs

    def _remove_adapter(self, digest: str) -> bool:
        with self._database.begin() as connection:
            hold_new_references(connection)
            if needed(connection, digest) or not self._is_old(self._store.modified_at(digest)):
                return False
            self._store.delete(digest)
            return True
