"""Keeps a claim's lease alive from a thread of its own, and brings back what the worker should do.

Knows the job queue, not what the worker does.
"""

from __future__ import annotations

import logging
import threading
import time
from enum import StrEnum

from service.job import Claim, Directive
from service.job_queue import FencedWriteError, JobQueue

logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 6


class StopReason(StrEnum):
    """Why a run must stop before it is done."""

    PAUSED = "paused"
    CANCELLED = "cancelled"
    LOST = "lost"
    SHUTDOWN = "shutdown"
    INTERRUPTED = "interrupted"  # never by a heartbeat: the run itself could not write


class StopRequested(BaseException):
    """Raised by `Heartbeat.check`. Not an `Exception`, so that no handler for failures takes it for one."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Heartbeat:
    """One thread for all claims of a worker, at normal priority: the worker's own thread may be starved."""

    def __init__(self, queue: JobQueue, *, max_interval_seconds: float = 1.0) -> None:
        self._queue = queue
        self._max_interval_seconds = max_interval_seconds
        self._condition = threading.Condition()
        self._claim: Claim | None = None
        self._reason: StopReason | None = None
        self._beaten_at = 0.0
        self._shutdown = False
        self._thread = threading.Thread(target=self._loop, name="tuning-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Call `shut_down` and wait for the worker first."""
        self.shut_down()
        with self._condition:
            self._claim = None
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def shut_down(self) -> None:
        """The process is about to end: `check` says so from now on, beats go on while there is a claim."""
        with self._condition:
            self._shutdown = True
            self._condition.notify_all()

    def watch(self, claim: Claim) -> None:
        with self._condition:
            self._claim, self._reason, self._beaten_at = claim, None, time.monotonic()
            self._condition.notify_all()

    def unwatch(self) -> None:
        with self._condition:
            self._claim = None

    def check(self) -> None:
        """Raises StopRequested as soon as there is a reason."""
        with self._condition:
            if self._reason is not None:
                raise StopRequested(self._reason)
            if self._claim is not None and time.monotonic() - self._beaten_at > self._claim.lease_seconds:
                raise StopRequested(StopReason.LOST)  # the lease ran out unrenewed: somebody else may have the job
            if self._shutdown:
                raise StopRequested(StopReason.SHUTDOWN)

    def _loop(self) -> None:
        while True:
            with self._condition:
                if self._claim is None:
                    if self._shutdown:
                        return
                    self._condition.wait()
                    continue
                claim = self._claim
            reason, beaten = self._beat(claim)
            with self._condition:
                if self._claim is claim:
                    self._reason = self._reason or reason
                    self._beaten_at = time.monotonic() if beaten else self._beaten_at
                    self._condition.wait(min(claim.lease_seconds / BEATS_PER_LEASE, self._max_interval_seconds))

    def _beat(self, claim: Claim) -> tuple[StopReason | None, bool]:
        """What the job's row says, and whether it could be asked."""
        try:
            directive = self._queue.heartbeat(claim)
        except FencedWriteError:
            return StopReason.LOST, True
        except Exception:  # the database may come back within the lease
            logger.exception("tuning.heartbeat_failed", extra={"job_id": claim.job.id})
            return None, False
        reasons = {Directive.PAUSE: StopReason.PAUSED, Directive.CANCEL: StopReason.CANCELLED}
        return reasons.get(directive), True
