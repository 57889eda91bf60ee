"""The streams that are being watched: the latest in memory, all as rows. One lock around them; knows no engine.

What changes a state is written at once, everything else every few seconds, so a crash loses no more than that. Several
replicas on one database each watch their own share of the traffic; the row is what the last of them wrote.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from adapters.adapter_files import AdapterSource
from adapters.errors import AdapterError, AdapterNotFoundError
from adapters.scoring import TaskKind
from service.database import Database, database_now, lock_tenant, new_id
from service.drift_board import DriftBoard
from service.drift_calibration import Calibrated
from service.drift_events import DriftEvent, append
from service.drift_intake import StreamKey
from service.drift_monitors import Monitors, PromptMonitor, Reference
from service.drift_rows import Blobs, digests_of, find, insert, update
from service.drift_sampling import Sampling, new_salt
from service.drift_states import DriftState
from service.drift_stream import DriftStream
from service.drift_view import Acknowledgement, ReferenceState, StreamView
from service.errors import ConflictError, NotFoundError
from service.tables import adapter_versions

log = structlog.get_logger("service.drift")

Monitor = TypeVar("Monitor")

MAX_IN_MEMORY = 64
"""Streams; the reference of one is about a quarter of a megabyte."""


class DriftStreams:
    """`files` brings an adapter's drift reference, from wherever it is kept; `basis` is that of the loaded base."""

    def __init__(
        self,
        database: Database,
        files: Callable[[str], AdapterSource],
        basis: str,
        monitors: Monitors,
        board: DriftBoard,
        *,
        max_in_memory: int = MAX_IN_MEMORY,
    ) -> None:
        self._database = database
        self._files = files
        self._basis = basis
        self._monitors = monitors
        self._board = board
        self._max_in_memory = max_in_memory
        self._loaded: OrderedDict[StreamKey, DriftStream] = OrderedDict()
        self.told: deque[DriftEvent] = deque()
        """What was written and the listeners have not heard."""
        self.lock = threading.RLock()
        """Held while a stream is looked at or changed; not while anything is measured or calibrated."""

    def get(self, key: StreamKey, model: str) -> DriftStream | None:
        """None for an adapter that the tenant has no more. Under the lock."""
        stream = self._loaded.get(key)
        if stream is None:
            stream = self._load(key, model)
            if stream is None:
                return None
            self._loaded[key] = stream
            self._make_room()
        self._loaded.move_to_end(key)
        return stream

    def loaded(self, key: StreamKey) -> DriftStream | None:
        return self._loaded.get(key)

    def save(self, streams: Sequence[DriftStream]) -> None:
        """Write them, and what happened to them. Under the lock.

        Raises sqlalchemy.exc.OperationalError: everything is kept for the next time.
        """
        told: list[DriftEvent] = []
        gone: list[DriftStream] = []
        with self._database.begin() as connection:
            for stream in sorted(streams, key=lambda stream: stream.key):
                if update(connection, stream.view, stream.blobs()):
                    append(connection, stream.unsaved)
                    told += stream.unsaved
                else:
                    gone.append(stream)
        for stream in streams:
            stream.unsaved, stream.is_dirty = [], False
        for stream in gone:
            self.drop(stream.key)
        self.told.extend(told)

    def save_dirty(self) -> None:
        with self.lock:
            dirty = [stream for stream in self._loaded.values() if stream.is_dirty]
            if dirty:
                self.save(dirty)

    def acknowledge(
        self, key: StreamKey, model: str, signal: str | None, given: Callable[[float], Acknowledgement]
    ) -> None:
        """One signal that is in drift, or all of them. Raises ConflictError when none is, NotFoundError."""
        with self.lock:
            stream = self.get(key, model)
            if stream is None:
                raise NotFoundError(f"The model '{model}' does not exist.", param="model", code="model_not_found")
            drifting = [name for name, found in stream.view.signals.items() if found.state is DriftState.DRIFT]
            chosen = [name for name in drifting if signal in (None, name)]
            if not chosen:
                what = "none of its signals is" if signal is None else f"its signal '{signal}' is not"
                raise ConflictError(
                    f"There is nothing to acknowledge about '{model}': {what} in the state 'drift'.",
                    param="signal" if signal else None,
                    code="nothing_to_acknowledge",
                )
            stream.acknowledge(chosen, given(time.time()))
            self.save([stream])
            self._board.put(stream.view)

    def drop(self, key: StreamKey) -> None:
        """Forget what is in memory: its rows are gone."""
        with self.lock:
            self._loaded.pop(key, None)
            self._board.forget(key)

    def drop_deleted(self, tenant_id: str) -> None:
        """Forget what is in memory of this tenant and has no row any more."""
        with self.lock:
            with self._database.read() as connection:
                left = digests_of(connection, tenant_id)
            for key in [key for key in self._loaded if key[0] == tenant_id and key[1] not in left]:
                del self._loaded[key]
            self._board.keep(tenant_id, left)

    def calibrated(self, done: Calibrated) -> None:
        """Under the lock. What failed would fail again, at seconds of work each time: not before the next start."""
        stream = self._loaded.get(done.key)
        if stream is None or not stream.needs_calibration:
            return
        if done.state is None:
            stream.may_calibrate = False
        else:
            stream.answers, stream.is_dirty = self._monitors.of_answers(done.key, done.state), True

    # -- loading ------------------------------------------------------------------------------------------------

    def _load(self, key: StreamKey, model: str) -> DriftStream | None:
        tenant_id, digest = key
        reference = self._reference(digest)
        with self._database.begin() as connection:
            with suppress(NotFoundError):
                lock_tenant(connection, tenant_id)
            task = _task_of(connection, key)
            if task is None:
                return None
            found = find(connection, tenant_id, digest)
            if found is None:
                found = self._new(connection, key, model)
                insert(connection, *found)
        view, blobs = found
        stream = self._assemble(view, blobs, reference)
        stream.expects_json = task == TaskKind.JSON
        stream.settle(view, time.time())
        return stream

    def _new(self, connection: Connection, key: StreamKey, model: str) -> tuple[StreamView, Blobs]:
        now = database_now(connection)
        view = StreamView(new_id("drift"), *key, model, self._basis, None, created_at=now, seen_at=now)
        return view, Blobs(new_salt())

    def _assemble(self, kept: StreamView, blobs: Blobs, reference: Reference | None) -> DriftStream:
        """What was kept on another base is no baseline for answers on this one."""
        key = (kept.tenant_id, kept.digest)
        known = StreamView(**{**kept.__dict__, "reference_basis": None if reference is None else reference.basis})
        view = known.on(self._basis)
        prompts: PromptMonitor | None = None
        if reference is not None and view.reference is ReferenceState.OK:
            prompts = self._restored(lambda state: self._monitors.of_prompts(reference, state), blobs.prompts, view)
        state = blobs.answers if kept.basis == self._basis else None
        return DriftStream(
            view=view,
            sampling=Sampling(blobs.salt, blobs.sampling),
            salt=blobs.salt,
            prompts=prompts,
            answers=self._restored(lambda state: self._monitors.of_answers(key, state), state, view),
            prompt_run_length=None if reference is None else reference.run_length,
            answer_run_length=self._monitors.run_length,
            kept_prompts=blobs.prompts,
        )

    def _restored(self, make: Callable[[bytes | None], Monitor], state: bytes | None, view: StreamView) -> Monitor:
        """A state that cannot be read is no reason to stop watching."""
        try:
            return make(state)
        except AdapterError as error:
            log.warning("drift_begins_again", tenant=view.tenant_id, digest=view.digest, reason=error.message)
            return make(None)

    def _reference(self, digest: str) -> Reference | None:
        try:
            return self._monitors.reference(self._files(digest))
        except AdapterNotFoundError:
            return None
        except AdapterError as error:
            log.warning("drift_reference_unreadable", digest=digest, reason=error.message)
            return None

    def _make_room(self) -> None:
        while len(self._loaded) > self._max_in_memory:
            oldest = next(iter(self._loaded.values()))
            if oldest.is_dirty:
                self.save([oldest])
            self._loaded.pop(oldest.key, None)


def _task_of(connection: Connection, key: StreamKey) -> str | None:
    """What the adapter was evaluated at ("" where it was not); None when the tenant has no such adapter."""
    mine = sa.and_(adapter_versions.c.tenant_id == key[0], adapter_versions.c.digest == key[1])
    rows = connection.execute(sa.select(adapter_versions.c.metrics).where(mine)).scalars().all()
    found = [(metrics.get("evaluation") or {}).get("task") for metrics in rows]
    return None if not rows else next((task for task in found if task), "")
