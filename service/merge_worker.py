"""The thread that merges models, one at a time, behind decoding in priority. Knows rows and `write_merged`, no HTTP."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

from adapters.durable import fsync_path
from adapters.errors import AdapterError
from adapters.peft_format import read_adapter
from adapters.store import AdapterStore
from adapters.thread_priority import lower_priority
from service.engine.base_model import BaseModel
from service.merges import LEASE_SECONDS, Merge, MergeGoneError, Merges
from service.merging import write_merged
from service.tuning_worker import background_stream

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0


class _Stopped(BaseException):
    """The service ends."""


class MergeWorker:
    """`start` it once; `stop` gives an unfinished merge back."""

    def __init__(
        self, merges: Merges, store: AdapterStore, base: BaseModel, *, max_rank: int, poll_seconds: float = 1.0
    ) -> None:
        self._merges = merges
        self._store = store
        self._base = base
        self._max_rank = max_rank
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="merging", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float = 5.0) -> None:
        self.ask_to_stop()
        self._thread.join(timeout_seconds)

    def ask_to_stop(self) -> None:
        """Without waiting."""
        self._stopping.set()

    def run(self, merge: Merge, check: Callable[[], None] = lambda: None) -> None:
        """Bring a claimed merge to an end, whatever happens; the row says which. `check` may raise to stop it."""
        try:
            directory = self._merges.directory(merge)
            weights = read_adapter(self._store.read(merge.digest), self._base.signature, max_rank=self._max_rank)
            report = write_merged(
                self._base, weights, directory, model=merge.model, digest=merge.digest, between_tensors=check
            )
            for path in (*directory.iterdir(), directory, directory.parent):
                fsync_path(path)
            num_bytes = sum(path.stat().st_size for path in directory.iterdir())
            self._merges.succeed(merge, num_bytes=num_bytes, report=asdict(report))
        except MergeGoneError:
            logger.info("merge.gone", extra={"merge_id": merge.id})
        except AdapterError as error:
            self._fail(merge, error.code or "merge_failed", error.message)
        except Exception:
            logger.exception("merge.failed", extra={"merge_id": merge.id})
            self._fail(merge, "internal_error", "The merge failed because of an internal error.")

    def _loop(self) -> None:
        lower_priority()
        swept_at = -SWEEP_SECONDS
        with background_stream(self._base.device):
            while not self._stopping.is_set():
                try:
                    if time.monotonic() - swept_at >= SWEEP_SECONDS:
                        self._merges.sweep()
                        swept_at = time.monotonic()
                    merge = self._merges.claim()
                    if merge is not None:
                        self._run_until_stopped(merge)
                        continue
                except Exception:  # the database is away, say: the worker outlives it
                    logger.exception("merge.worker_error")
                self._stopping.wait(self._poll_seconds)

    def _run_until_stopped(self, merge: Merge) -> None:
        renewed_at = time.monotonic()

        def check() -> None:
            nonlocal renewed_at
            if self._stopping.is_set():
                raise _Stopped
            if time.monotonic() - renewed_at > LEASE_SECONDS / 6:
                self._merges.renew(merge)
                renewed_at = time.monotonic()

        logger.info("merge.claimed", extra={"merge_id": merge.id, "attempt": merge.attempt})
        try:
            self.run(merge, check)
        except _Stopped:
            self._merges.release(merge)

    def _fail(self, merge: Merge, code: str, message: str) -> None:
        try:
            self._merges.fail(merge, code=code, message=message)
        except MergeGoneError:
            logger.info("merge.gone", extra={"merge_id": merge.id})
