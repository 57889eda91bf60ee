"""The tenant's side of fine-tuning jobs: create, look, cancel, pause, resume. Knows no HTTP and no tensors.

The worker's side is `service.job_queue`; the values are in `service.job`. Every transition is one method writing
one row. Asking again for a transition that happened already answers the job as it is, so a client may retry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.aliases import check_alias_name
from service.database import Database, Page, lock_tenant, new_id, page_of
from service.errors import ConflictError, InvalidRequestError, NotFoundError
from service.files import require_training_file
from service.gate_policies import GatePolicies
from service.job import Checkpoint, Event, Job, JobSpec, JobStatus
from service.job_rows import UNFINISHED, checkpoint_of, ending, event_of, insert_event, job_of, select_jobs
from service.quotas import check_job
from service.tables import adapter_versions, epoch_now, job_events, job_metadata, jobs
from service.usage_rows import book_training

KEY_WINDOW_SECONDS = 24 * 3600.0
RETRY_WINDOW_SECONDS = 900.0
SILENT_WINDOW_SECONDS = 10.0
NUM_REMEMBERED = 5
"""Finished jobs whose pace a new one is expected to have."""


@dataclass(frozen=True)
class Idempotency:
    """How a repeated `create` is recognised; see `Jobs.create`.

    `request_digest` is the sha256 of the request body, before defaults; `key` the Idempotency-Key header;
    `retry` whether the client says that it repeats itself (None: it says nothing).
    """

    request_digest: str
    key: str | None = None
    retry: bool | None = None

    @property
    def window_seconds(self) -> float:
        """How long ago the same body may have been sent to count as the same request."""
        if self.retry is None:
            return SILENT_WINDOW_SECONDS
        return RETRY_WINDOW_SECONDS if self.retry else 0.0


class JobObserver(Protocol):
    """Who counts. Called after the transaction that it reports."""

    def job_entered(self, state: JobStatus) -> None: ...
    def write_fenced(self) -> None: ...


class Jobs:
    def __init__(self, database: Database, observer: JobObserver | None = None) -> None:
        self._database = database
        self._observer = observer
        self.gate_policies = GatePolicies(database)

    def create(self, tenant_id: str, spec: JobSpec, idempotency: Idempotency, *, key_id: str | None = None) -> Job:
        """Queue a job, or answer the one that an earlier sending of this very request queued.

        The same request is: the same Idempotency-Key within a day (another body under it is refused); without a
        key, the same body while that job is unfinished, within 15 minutes if the client says that it retries,
        within 10 seconds if it says nothing, and never if it says that this is its first try (the official
        client always says which: `x-stainless-retry-count`).

        `key_id` is the key whose use it is. Raises InvalidRequestError for a file that is missing or not for
        fine-tuning, QuotaExceededError.
        """
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            twin = _find_twin(connection, tenant_id, idempotency)
            if twin is not None:
                return twin
            job = queue_job(connection, tenant_id, spec, idempotency, key_id)
        self._report(JobStatus.QUEUED)
        return job

    def queued(self) -> None:
        """Somebody queued a job in a transaction of their own, which is committed."""
        self._report(JobStatus.QUEUED)

    def get(self, tenant_id: str, job_id: str) -> Job:
        with self._database.read() as connection:
            return _get(connection, tenant_id, job_id)

    def list(
        self,
        tenant_id: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[Job]:
        """Newest first. `metadata`: only jobs that carry all these pairs; an empty mapping: only jobs with none."""
        query = select_jobs().where(jobs.c.tenant_id == tenant_id, *_matching(metadata))
        with self._database.read() as connection:
            rows, has_more = page_of(connection, query, jobs, after=after, limit=limit, descending=True)
        return Page(tuple(job_of(row) for row in rows), has_more)

    def cancel(self, tenant_id: str, job_id: str) -> Job:
        """Final at once, also while a worker runs it: the worker's next write raises JobCancelledError."""
        with self._database.begin() as connection:
            job = _get(connection, tenant_id, job_id, lock=True)
            if job.state is JobStatus.CANCELLED:
                return job
            _refuse_if_final(job, "cancelled")
            _update(connection, job_id, **ending(JobStatus.CANCELLED))
            book_training(connection, job_id)
            insert_event(connection, job_id, "Fine-tuning job cancelled")
            job = _get(connection, tenant_id, job_id)
        self._report(JobStatus.CANCELLED)
        return job

    def pause(self, tenant_id: str, job_id: str) -> Job:
        """Nobody claims a paused job; a worker that runs it saves its state and gives it back."""
        return self._set_paused(tenant_id, job_id, True, "paused")

    def resume(self, tenant_id: str, job_id: str) -> Job:
        return self._set_paused(tenant_id, job_id, False, "resumed")

    def events(self, tenant_id: str, job_id: str, *, after: str | None = None, limit: int = 20) -> Page[Event]:
        """Newest first."""
        query = sa.select(job_events).where(job_events.c.job_id == job_id)
        with self._database.read() as connection:
            _get(connection, tenant_id, job_id)
            rows, has_more = page_of(connection, query, job_events, after=after, limit=limit, descending=True)
        return Page(tuple(event_of(row) for row in rows), has_more)

    def checkpoints(
        self, tenant_id: str, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> Page[Checkpoint]:
        """Newest first."""
        query = sa.select(adapter_versions).where(
            adapter_versions.c.job_id == job_id, adapter_versions.c.checkpoint_id.is_not(None)
        )
        table = adapter_versions
        with self._database.read() as connection:
            _get(connection, tenant_id, job_id)
            rows, has_more = page_of(
                connection, query, table, after=after, limit=limit, descending=True, id_column=table.c.checkpoint_id
            )
        return Page(tuple(checkpoint_of(row) for row in rows), has_more)

    def data_report(self, tenant_id: str, job_id: str) -> Mapping[str, Any] | None:
        """What the job's files are like (`DataReport.as_dict`); None before a worker has read them."""
        query = sa.select(jobs.c.data_report).where(jobs.c.id == job_id)
        with self._database.read() as connection:
            _get(connection, tenant_id, job_id)
            report: Mapping[str, Any] | None = connection.execute(query).scalar_one()
        return report

    def check(self, tenant_id: str, spec: JobSpec) -> None:
        """Raises what `create` would raise about this spec."""
        if spec.alias is not None:
            check_alias_name(spec.alias, spec.base_model)
        with self._database.read() as connection:
            _require_files(connection, tenant_id, spec)

    def tokens_per_second(self, base_fingerprint: str) -> float | None:
        """What the last jobs that trained on this base did, of whichever tenant: their median. None: there are none."""
        made = sa.exists().where(
            adapter_versions.c.job_id == jobs.c.id, adapter_versions.c.base_fingerprint == base_fingerprint
        )
        query = sa.select(jobs.c.tokens_per_second).where(jobs.c.tokens_per_second.is_not(None), made)
        with self._database.read() as connection:
            rates = connection.execute(query.order_by(jobs.c.seq.desc()).limit(NUM_REMEMBERED)).scalars().all()
        return median(rates) if rates else None

    def _set_paused(self, tenant_id: str, job_id: str, paused: bool, verb: str) -> Job:
        with self._database.begin() as connection:
            job = _get(connection, tenant_id, job_id, lock=True)
            _refuse_if_final(job, verb)
            if job.paused == paused:
                return job
            _update(connection, job_id, paused=paused)
            insert_event(connection, job_id, f"Fine-tuning job {verb}")
            return _get(connection, tenant_id, job_id)

    def _report(self, state: JobStatus) -> None:
        if self._observer is not None:
            self._observer.job_entered(state)


def queue_job(
    connection: Connection, tenant_id: str, spec: JobSpec, idempotency: Idempotency, key_id: str | None = None
) -> Job:
    """A new job, in the transaction of a caller who holds `lock_tenant`. Raises what `create` raises."""
    if spec.alias is not None:
        check_alias_name(spec.alias, spec.base_model)
    _require_files(connection, tenant_id, spec)
    check_job(connection, tenant_id)
    return _get(connection, tenant_id, _insert(connection, tenant_id, spec, idempotency, key_id))


def _find_twin(connection: Connection, tenant_id: str, idempotency: Idempotency) -> Job | None:
    query = select_jobs().where(jobs.c.tenant_id == tenant_id)
    if idempotency.key is not None:
        query = query.where(
            jobs.c.idempotency_key == idempotency.key, jobs.c.created_at > epoch_now() - KEY_WINDOW_SECONDS
        )
    else:
        query = query.where(
            jobs.c.request_digest == idempotency.request_digest,
            jobs.c.created_at > epoch_now() - idempotency.window_seconds,
            jobs.c.state.in_(UNFINISHED),
        )
    row = connection.execute(query.order_by(jobs.c.seq.desc()).limit(1)).one_or_none()
    if row is not None and row.request_digest != idempotency.request_digest:
        raise InvalidRequestError(
            f"Idempotency-Key '{idempotency.key}' came with another request before.", code="idempotency_key_reused"
        )
    return None if row is None else job_of(row)


def _require_files(connection: Connection, tenant_id: str, spec: JobSpec) -> None:
    require_training_file(connection, tenant_id, spec.training_file, param="training_file")
    if spec.validation_file is not None:
        require_training_file(connection, tenant_id, spec.validation_file, param="validation_file")
    if spec.evaluation.file is not None:
        require_training_file(connection, tenant_id, spec.evaluation.file, param="evaluation.file")


def _insert(connection: Connection, tenant_id: str, spec: JobSpec, idempotency: Idempotency, key_id: str | None) -> str:
    job_id = new_id("ftjob")
    connection.execute(
        jobs.insert().values(
            id=job_id,
            tenant_id=tenant_id,
            spec=spec.as_dict(),
            training_file=spec.training_file,
            validation_file=spec.validation_file,
            evaluation_file=spec.evaluation.file,
            parent_digest=spec.parent_digest,
            state=JobStatus.QUEUED,
            created_at=epoch_now(),
            idempotency_key=idempotency.key,
            request_digest=idempotency.request_digest,
            key_id=key_id,
        )
    )
    pairs = [{"job_id": job_id, "key": key, "value": value} for key, value in (spec.metadata or {}).items()]
    if pairs:
        connection.execute(job_metadata.insert(), pairs)
    insert_event(connection, job_id, f"Created fine-tuning job: {job_id}")
    return job_id


def _matching(metadata: Mapping[str, str] | None) -> list[sa.ColumnElement[bool]]:
    if metadata is None:
        return []
    pairs = sa.select(job_metadata.c.job_id)
    if not metadata:
        return [jobs.c.id.not_in(pairs)]
    return [
        jobs.c.id.in_(pairs.where(job_metadata.c.key == key, job_metadata.c.value == value))
        for key, value in metadata.items()
    ]


def _update(connection: Connection, job_id: str, **values: Any) -> None:
    connection.execute(jobs.update().where(jobs.c.id == job_id).values(**values))


def _refuse_if_final(job: Job, verb: str) -> None:
    if job.state.final:
        raise ConflictError(
            f"Job '{job.id}' has {job.state} already and cannot be {verb}.", param="job_id", code="invalid_job_state"
        )


def _get(connection: Connection, tenant_id: str, job_id: str, *, lock: bool = False) -> Job:
    query = select_jobs().where(jobs.c.tenant_id == tenant_id, jobs.c.id == job_id)
    if lock:
        query = query.with_for_update(of=jobs)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no fine-tuning job '{job_id}'.", param="job_id", code="job_not_found")
    return job_of(row)
