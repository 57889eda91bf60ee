"""Fine-tuning jobs, and how training is held back. Implements the queue's JobObserver and the gate's PaceObserver."""

from __future__ import annotations

from service.job import JobStatus
from service.metrics.series import Series

JOB_BUCKETS = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400)


class JobMetrics(Series):
    """Knows no tenant: who trains how much is in the database."""

    def __init__(self) -> None:
        super().__init__()
        self._training_job = self._histogram(
            "training_job_seconds", "Run time of a fine-tuning job.", JOB_BUCKETS, "outcome"
        )
        self._jobs = self._counter("jobs", "Fine-tuning jobs that entered a state.", "state")
        self._job_fenced_writes = self._counter("job_fenced_writes", "Writes refused: the claim was lost.")
        self._training_pace = self._gauge(
            "training_pace_ratio", "Share of the time in which answers are written that training may run."
        )
        self._training_pace.set(1.0)
        self._training_held = self._counter(
            "training_held_seconds", "Time for which training was held back to keep answers fast."
        )
        self._decode_step_p99 = self._gauge(
            "decode_step_p99_seconds", "Between two tokens, of the latest steps without prompts beside training."
        )

    def job_entered(self, state: JobStatus) -> None:
        self._jobs.labels(state.value).inc()

    def write_fenced(self) -> None:
        self._job_fenced_writes.inc()

    def job_run_finished(self, outcome: str, seconds: float) -> None:
        """One worker's run of a job ended: succeeded, failed, cancelled, paused, …"""
        self._training_job.labels(outcome).observe(seconds)

    def training_paced(self, ratio: float, p99_seconds: float | None, held_seconds: float) -> None:
        """How much training may run beside answers, as the latency target steers it."""
        self._training_pace.set(ratio)
        self._training_held.inc(held_seconds)
        if p99_seconds is not None:
            self._decode_step_p99.set(p99_seconds)
