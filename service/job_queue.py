"""The worker's side of fine-tuning jobs: claim, lease, fence, finish. Knows no HTTP and no tensors.

Every write is fenced: it touches the row only `WHERE id = ? AND attempt = ? AND state = 'running'`, and renews
the lease. Zero rows raise `FencedWriteError`: somebody else owns the job now, stop at once. When the reason is
that the client cancelled it (or deleted its tenant), the error is a `JobCancelledError`, which is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from service.database import Database
from service.files import StagedFile
from service.job import Claim, Directive, EventLevel, EventType, JobStatus


class FencedWriteError(Exception):
    """The claim is no longer valid: the lease ran out and another worker took the job."""


class JobCancelledError(FencedWriteError):
    """The claim is no longer valid because the job was cancelled; nothing is wrong."""


class JobObserver(Protocol):
    """Who counts. Called after the transaction that it reports."""

    def job_entered(self, state: JobStatus) -> None: ...
    def write_fenced(self) -> None: ...


class JobQueue:
    def __init__(
        self,
        database: Database,
        *,
        lease_seconds: float = 30.0,
        max_lost_leases: int = 3,
        observer: JobObserver | None = None,
    ) -> None:
        """A job whose worker vanished more than `max_lost_leases` times fails with code `worker_lost`."""
        raise NotImplementedError

    def claim(self, worker: str) -> Claim | None:
        """The oldest job that is queued and not paused, or whose lease has run out; attempt is raised."""
        raise NotImplementedError

    def heartbeat(self, claim: Claim) -> Directive:
        """Renew the lease. CANCEL: stop, write nothing. PAUSE: save a resume point and `release`.

        Raises FencedWriteError when another worker has the job."""
        raise NotImplementedError

    def files_validated(self, claim: Claim) -> None:
        """The files are fine: the job leaves `validating_files`. The claim goes on."""
        raise NotImplementedError

    def event(
        self,
        claim: Claim,
        message: str,
        *,
        level: EventLevel = EventLevel.INFO,
        type: EventType = EventType.MESSAGE,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        raise NotImplementedError

    def progress(
        self,
        claim: Claim,
        *,
        trained_tokens: int | None = None,
        estimated_finish: float | None = None,
        resolved: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what is known by now; None leaves a column as it is. `estimated_finish` is unix seconds."""
        raise NotImplementedError

    def checkpoint(self, claim: Claim, *, step: int, digest: str, base_fingerprint: str,
                   metrics: Mapping[str, float | None]) -> None:
        """List a servable snapshot under `…:ckpt-step-{step}`. The same step again replaces the row."""
        raise NotImplementedError

    def save_resume_point(self, claim: Claim, reference: str) -> None:
        """Remember where the training state lies (durably written before this call)."""
        raise NotImplementedError

    def release(self, claim: Claim) -> None:
        """Give the job back, unfinished: paused by the client, or this worker shuts down."""
        raise NotImplementedError

    def fail(self, claim: Claim, *, code: str, message: str, param: str | None = None) -> None:
        raise NotImplementedError

    def succeed(
        self,
        claim: Claim,
        *,
        digest: str,
        base_fingerprint: str,
        metrics: Mapping[str, Any],
        trained_tokens: int,
        result_files: Sequence[StagedFile] = (),
    ) -> str:
        """ONE transaction: result files, adapter version, the alias the spec names, and the job row.

        Returns the fine-tuned model's id (`claim.job.model_id`)."""
        raise NotImplementedError

    def max_lease_age_seconds(self) -> float:
        """Seconds since the stalest running job's last heartbeat; 0 when none runs."""
        raise NotImplementedError
