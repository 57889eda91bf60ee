"""Several workers, so that several jobs train at once, together on the one base. Knows no job and no turns.

Their forwards meet in `adapters.shared_forward`. On CUDA they share one stream: what one thread has computed for
another is then ordered by the stream, as the threads themselves are by their turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from adapters.shared_forward import SharedForward
from service.training_gate import TrainingGate
from service.tuning import TuningServices
from service.tuning_worker import TuningWorker, low_priority_stream


class TuningPool:
    """`start` it once; `stop` gives all running jobs back with their states saved."""

    def __init__(
        self,
        services: TuningServices,
        num_jobs: int,
        *,
        name: str,
        gates: Callable[[], TrainingGate] | None = None,
        poll_seconds: float = 0.5,
        heartbeat_seconds: float = 1.0,
    ) -> None:
        """`num_jobs` are trained at once, at most; `gates` makes each worker's gate."""
        base = services.base
        if num_jobs > 1:
            services = replace(services, shared=SharedForward(base.model, base.device))
        stream = low_priority_stream(base.device)
        self.workers = [
            TuningWorker(
                services,
                name=f"{name}-{number}" if num_jobs > 1 else name,
                poll_seconds=poll_seconds,
                heartbeat_seconds=heartbeat_seconds,
                stream=stream,
                gate=None if gates is None else gates(),
            )
            for number in range(1, num_jobs + 1)
        ]

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """All are asked before any is waited for: a job stops in the time that one takes."""
        deadline = time.monotonic() + timeout_seconds
        self.ask_to_stop()
        for worker in self.workers:
            worker.stop(max(0.0, deadline - time.monotonic()))

    def ask_to_stop(self) -> None:
        """Without waiting."""
        for worker in self.workers:
            worker.ask_to_stop()

    @property
    def alive(self) -> bool:
        return any(worker.alive for worker in self.workers)
