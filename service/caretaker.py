"""The thread that looks after what is stored: verifies it at rest, slowly, and sweeps away what nobody needs.

Runs in the API's process behind everybody (niced). Several services may look after one storage. Knows no HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import sqlalchemy as sa
import structlog

from adapters.errors import AdapterDamagedError, AdapterError, AdapterNotFoundError
from adapters.store import AdapterStore
from adapters.thread_priority import lower_priority
from service.database import Database
from service.fallback import Fallback
from service.garbage import Garbage
from service.tables import adapter_versions

log = structlog.get_logger("service.caretaker")

POLL_SECONDS = 5.0


class CaretakerObserver(Protocol):
    """Who counts."""

    def adapter_verify_failed(self, reason: str) -> None: ...
    def adapter_checked(self) -> None: ...
    def store_checked(self, at: float) -> None: ...


class _Stopped(Exception):
    """The service ends."""


class Scrubber:
    """Verifies every adapter that a row names. One that is damaged is set aside by the store; its aliases fall back."""

    def __init__(
        self,
        database: Database,
        store: AdapterStore,
        fallback: Fallback,
        observer: CaretakerObserver,
        *,
        bytes_per_second: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._database = database
        self._store = store
        self._fallback = fallback
        self._observer = observer
        self._bytes_per_second = bytes_per_second
        self._sleep = sleep

    def scrub(self) -> list[str]:
        """One full pass; the digests that are damaged or missing. Raises StoreError when the store does not answer."""
        lost = []
        for digest in self._published():
            try:
                self._store.verify(digest, self._pace)
                self._observer.adapter_checked()
            except (AdapterDamagedError, AdapterNotFoundError) as error:
                if isinstance(error, AdapterNotFoundError) and digest not in self._published():
                    continue  # deleted just now
                reason = "digest" if isinstance(error, AdapterDamagedError) else "missing"
                log.error("stored_adapter_lost", digest=digest, reason=error.message)
                self._observer.adapter_verify_failed(reason)
                self._fallback.away_from(digest)
                lost.append(digest)
        self._observer.store_checked(time.time())
        return lost

    def _pace(self, num_bytes: int) -> None:
        self._sleep(num_bytes / self._bytes_per_second)

    def _published(self) -> Sequence[str]:
        query = sa.select(adapter_versions.c.digest).distinct().order_by(adapter_versions.c.digest)
        with self._database.read() as connection:
            return connection.execute(query).scalars().all()


class Caretaker:
    """`start` it once. Each of the two is left out where its interval is 0."""

    def __init__(self, *, sweep_seconds: float, scrub_seconds: float) -> None:
        self._intervals = {"sweep": sweep_seconds, "scrub": scrub_seconds}
        self._work: dict[str, Callable[[], object]] = {}
        self._due = {name: time.monotonic() + min(60.0, seconds) for name, seconds in self._intervals.items()}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="caretaker", daemon=True)

    def start(self, garbage: Garbage, scrubber: Scrubber) -> None:
        self._work = {"sweep": garbage.sweep, "scrub": scrubber.scrub}
        if any(self._intervals.values()):
            self._thread.start()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def sleep(self, seconds: float) -> None:
        """For the scrubber: ends at once, with the pass, when the service does."""
        if self._stopping.wait(seconds):
            raise _Stopped

    def _loop(self) -> None:
        with suppress(OSError):
            lower_priority()
        while not self._stopping.wait(POLL_SECONDS):
            for name, work in self._work.items():
                if not self._intervals[name] or time.monotonic() < self._due[name]:
                    continue
                try:
                    work()
                except _Stopped:
                    return
                except AdapterError as error:
                    log.warning(f"{name}_failed", reason=error.message)
                except Exception:  # the database is away, say: it is tried again
                    log.exception(f"{name}_failed")
                self._due[name] = time.monotonic() + self._intervals[name]
