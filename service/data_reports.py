"""Data reports of uploaded files, made on one niced thread, remembered by content. Knows no HTTP and no job queue."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Protocol

from adapters.corpus import Codec
from adapters.data_report import Base, DataReport, make_report
from adapters.thread_priority import lower_priority
from service.errors import DeadlineExceededError, RateLimitError, UnavailableError
from service.files import File, Files
from service.tuning_data import BREATH_SECONDS, MAX_TRAIN_LENGTH

MAX_REMEMBERED = 128
MAX_WAITING = 16
MAX_WAITING_OF_A_TENANT = 2
LIMIT_SECONDS = 600.0


class ReportedBase(Codec, Protocol):
    """What a report needs of the loaded base."""

    @property
    def max_model_len(self) -> int: ...

    @property
    def added_tokens(self) -> frozenset[str]: ...


def base_of_reports(base: ReportedBase) -> Base:
    """As jobs train on it."""
    return Base(base, min(base.max_model_len, MAX_TRAIN_LENGTH), base.added_tokens)


@dataclass(frozen=True)
class FileReport:
    """A report of one tenant's file, or pair of files."""

    id: str
    created_at: float
    report: DataReport


class DataReports:
    """One report at a time; the same content of the same tenant is answered from memory."""

    def __init__(self, files: Files, base: ReportedBase, *, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._files = files
        self._base = base
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._remembered: OrderedDict[tuple[str, str], FileReport] = OrderedDict()
        self._waiting: Counter[str] = Counter()
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data-report", initializer=lower_priority)

    def submit(self, tenant_id: str, training: File, validation: File | None = None) -> Future[FileReport]:
        """Raises RateLimitError when this tenant waits for two reports already, UnavailableError when all do."""
        known = self._recall(_key(tenant_id, training, validation))
        if known is not None:
            done: Future[FileReport] = Future()
            done.set_result(known)
            return done
        with self._lock:
            self._refuse_if_crowded(tenant_id)
            self._waiting[tenant_id] += 1
        future = self._pool.submit(self._make, tenant_id, training, validation)
        future.add_done_callback(lambda _: self._leave(tenant_id))
        return future

    def forget(self, tenant_id: str) -> None:
        """Of a deleted tenant: reports show pieces of its files."""
        with self._lock:
            for key in [key for key in self._remembered if key[0] == tenant_id]:
                del self._remembered[key]

    def close(self) -> None:
        """Give up what is running and waiting."""
        self._closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, tenant_id: str, training: File, validation: File | None) -> FileReport:
        key = _key(tenant_id, training, validation)
        known = self._recall(key)  # somebody asked for it just before
        if known is not None:
            return known
        report = make_report(
            partial(self._files.open, tenant_id, training.id),
            None if validation is None else partial(self._files.open, tenant_id, validation.id),
            base=base_of_reports(self._base),
            breathe=self._breather(),
        )
        made = FileReport(f"filereport-{key[1][:24]}", time.time(), report)
        with self._lock:
            self._remembered[key] = made
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return made

    def _recall(self, key: tuple[str, str]) -> FileReport | None:
        with self._lock:
            if key in self._remembered:
                self._remembered.move_to_end(key)
            return self._remembered.get(key)

    def _refuse_if_crowded(self, tenant_id: str) -> None:
        if self._waiting[tenant_id] >= MAX_WAITING_OF_A_TENANT:
            raise RateLimitError(f"{MAX_WAITING_OF_A_TENANT} reports of yours are being made: wait for one.")
        if self._closing.is_set() or self._waiting.total() >= MAX_WAITING:
            raise UnavailableError("Too many data reports are waiting.", retry_after=10.0)

    def _leave(self, tenant_id: str) -> None:
        with self._lock:
            self._waiting[tenant_id] -= 1
            self._waiting += Counter()  # forgets tenants that wait for nothing

    def _breather(self) -> Callable[[], None]:
        """Called for each line: lets other threads go first, and ends what takes too long."""
        deadline = time.monotonic() + self._limit_seconds

        def breathe() -> None:
            if self._closing.is_set():
                raise UnavailableError("The service is shutting down.")
            if time.monotonic() > deadline:
                raise DeadlineExceededError(
                    f"The report was not done within {self._limit_seconds:g} seconds: report on a part of the file.",
                    code="report_timeout",
                )
            time.sleep(BREATH_SECONDS)

        return breathe


def _key(tenant_id: str, training: File, validation: File | None) -> tuple[str, str]:
    parts = (tenant_id, training.sha256, "" if validation is None else validation.sha256)
    return tenant_id, sha256("\0".join(parts).encode()).hexdigest()
