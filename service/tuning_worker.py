"""The thread that claims fine-tuning jobs and runs them beside the engine, behind it in priority.

Knows the job queue and `TuningRun`, not what a run does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import structlog
import torch

from adapters.pausing import pausing
from adapters.thread_priority import lower_priority
from service.heartbeat import Heartbeat
from service.job import Claim
from service.tracing.job_trace import JobTrace
from service.training_gate import TrainingGate
from service.tuning import Outcome, TuningRun, TuningServices

logger = logging.getLogger(__name__)


class TuningWorker:
    """One job at a time. `start` it once; `stop` gives a running job back with its state saved."""

    def __init__(
        self,
        services: TuningServices,
        *,
        name: str,
        gate: TrainingGate | None = None,
        poll_seconds: float = 0.5,
        heartbeat_seconds: float = 1.0,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """`gate` holds training back for a latency target; None: priorities alone arbitrate. `heartbeat_seconds` is
        how long a pause or cancel may take to be noticed, at most. `stream`: that of all workers who train together;
        unset, one of its own.
        """
        self._services = services
        self._gate = gate
        self._stream = stream
        self._name = name
        self._poll_seconds = poll_seconds
        self._heartbeat = Heartbeat(services.queue, max_interval_seconds=heartbeat_seconds)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tuning", daemon=True)

    def start(self) -> None:
        self._heartbeat.start()
        self._thread.start()

    def stop(self, timeout_seconds: float = 30.0) -> None:
        """Ask the running job to stop at its next opportunity and wait for it."""
        self.ask_to_stop()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            logger.warning("tuning.stop_timed_out")  # its lease runs out and another process resumes the job
        else:
            self._heartbeat.stop()

    def ask_to_stop(self) -> None:
        """Without waiting."""
        self._stopping.set()
        self._heartbeat.shut_down()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _loop(self) -> None:
        lower_priority()
        with background_stream(self._services.base.device, self._stream):
            while not self._stopping.is_set():
                try:
                    claim = self._services.queue.claim(self._name)
                    if claim is not None:
                        self._run(claim)
                        continue
                except Exception:  # the database is away, say: the worker outlives it
                    logger.exception("tuning.worker_error")
                self._stopping.wait(self._poll_seconds)

    def _run(self, claim: Claim) -> None:
        traces = self._services.traces
        trace = JobTrace(claim) if traces is None else traces.job(claim)
        ids = {"job_id": claim.job.id, "tenant": claim.job.tenant_id, "attempt": claim.attempt, **trace.log_ids}
        with structlog.contextvars.bound_contextvars(**ids):  # whatever is logged in this thread carries them
            logger.info("tuning.claimed")
            started = time.monotonic()
            outcome = Outcome.LOST
            self._heartbeat.watch(claim)
            check = self._heartbeat.check
            try:
                with pausing(None if self._gate is None else partial(self._gate.hold, check)):
                    outcome = TuningRun(self._services, claim, check, trace).execute()
            finally:
                self._heartbeat.unwatch()
                trace.ended(outcome.value, failed=outcome is Outcome.FAILED)
            seconds = time.monotonic() - started
            self._services.observer.job_run_finished(outcome.value, seconds)
            logger.info("tuning.run_finished", extra={"outcome": outcome.value, "seconds": round(seconds, 3)})


def background_stream(device: torch.device, stream: torch.cuda.Stream | None = None) -> AbstractContextManager[object]:
    """On CUDA, a stream of the lowest priority: the engine's kernels go first."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(stream or low_priority_stream(device))


def low_priority_stream(device: torch.device) -> torch.cuda.Stream | None:
    """None where there are no streams."""
    return torch.cuda.Stream(device, priority=0) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def work_clock(device: torch.device) -> Callable[[], float]:
    """How long training ran. On CPU it is the time of its own thread that counts: while the kernel lets it stand
    behind decoding, it disturbs nobody. Started there, forward and backward run in one thread."""
    return time.thread_time if device.type == "cpu" else time.monotonic


def wait_for_stream(device: torch.device) -> None:
    """Until the device has done what this thread gave it; on CPU it has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
