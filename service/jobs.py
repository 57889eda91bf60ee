"""The tenant's side of fine-tuning jobs: create, look, cancel, pause, resume. Knows no HTTP and no tensors.

The worker's side is `service.job_queue`; the values are in `service.job`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.database import Database, Page
from service.job import Checkpoint, Event, Job, JobSpec


@dataclass(frozen=True)
class Idempotency:
    """How a repeated `create` is recognised; see `Jobs.create`.

    `request_digest` is the sha256 of the request body, before defaults; `key` the Idempotency-Key header;
    `retry` whether the client says that it repeats itself (None: it says nothing).
    """

    request_digest: str
    key: str | None = None
    retry: bool | None = None


class Jobs:
    def __init__(self, database: Database) -> None:
        raise NotImplementedError

    def create(self, tenant_id: str, spec: JobSpec, idempotency: Idempotency) -> Job:
        raise NotImplementedError

    def get(self, tenant_id: str, job_id: str) -> Job:
        raise NotImplementedError

    def list(self, tenant_id: str, *, after: str | None = None, limit: int = 20,
             metadata: Mapping[str, str] | None = None) -> Page[Job]:
        raise NotImplementedError

    def cancel(self, tenant_id: str, job_id: str) -> Job:
        """Final at once, also while a worker runs it: its next write is refused with JobCancelledError."""
        raise NotImplementedError

    def pause(self, tenant_id: str, job_id: str) -> Job:
        raise NotImplementedError

    def resume(self, tenant_id: str, job_id: str) -> Job:
        raise NotImplementedError

    def events(self, tenant_id: str, job_id: str, *, after: str | None = None, limit: int = 20) -> Page[Event]:
        """Newest first."""
        raise NotImplementedError

    def checkpoints(self, tenant_id: str, job_id: str, *, after: str | None = None,
                    limit: int = 10) -> Page[Checkpoint]:
        """Newest first."""
        raise NotImplementedError
