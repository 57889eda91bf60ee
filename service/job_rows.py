"""Jobs, events and checkpoints between rows and values, for both sides of a job. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import new_id
from service.job import Checkpoint, Event, EventLevel, EventType, Job, JobError, JobSpec, JobStatus
from service.tables import epoch_now, job_events, jobs, tenants

UNFINISHED = (JobStatus.QUEUED, JobStatus.RUNNING)


def select_jobs() -> sa.Select[Any]:
    """All but the data report, which is long and read on its own."""
    columns = (column for column in jobs.c if column is not jobs.c.data_report)
    return sa.select(*columns, tenants.c.name.label("tenant_name")).select_from(jobs.join(tenants))


def job_of(row: sa.Row[Any]) -> Job:
    return Job(
        id=row.id,
        tenant_id=row.tenant_id,
        tenant_name=row.tenant_name,
        spec=JobSpec.from_dict(row.spec),
        state=JobStatus(row.state),
        files_validated=row.files_validated,
        paused=row.paused,
        attempt=row.attempt,
        created_at=row.created_at,
        finished_at=row.finished_at,
        estimated_finish=row.estimated_finish,
        trained_tokens=row.trained_tokens,
        resolved=row.resolved,
        fine_tuned_model=row.fine_tuned_model,
        result_files=tuple(row.result_files),
        error=None if row.error is None else JobError(**row.error),
        resume_point=row.resume_point,
        estimate=row.estimate,
    )


def ending(state: JobStatus, **values: Any) -> dict[str, Any]:
    """The columns of a transition into a final state: nothing is leased, expected or paused any more."""
    return {
        "state": state,
        "paused": False,
        "worker": None,
        "lease_expires_at": None,
        "estimated_finish": None,
        "finished_at": epoch_now(),
        **values,
    }


def insert_event(
    connection: Connection,
    job_id: str,
    message: str,
    *,
    level: EventLevel = EventLevel.INFO,
    type: EventType = EventType.MESSAGE,
    data: Mapping[str, Any] | None = None,
) -> None:
    connection.execute(
        job_events.insert().values(
            id=new_id("ftevent"),
            job_id=job_id,
            created_at=epoch_now(),
            level=level,
            type=type,
            message=message,
            data=None if data is None else dict(data),
        )
    )


def event_of(row: sa.Row[Any]) -> Event:
    return Event(
        id=row.id,
        job_id=row.job_id,
        created_at=row.created_at,
        level=EventLevel(row.level),
        type=EventType(row.type),
        message=row.message,
        data=row.data,
    )


def checkpoint_of(row: sa.Row[Any]) -> Checkpoint:
    return Checkpoint(
        id=row.checkpoint_id,
        job_id=row.job_id,
        created_at=row.created_at,
        step=row.step,
        model_id=row.id,
        digest=row.digest,
        metrics=row.metrics,
    )
