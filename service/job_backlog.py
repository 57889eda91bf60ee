"""How many jobs are unfinished, and how long the stalest of each kind has shown nothing. Knows no metric.

A heartbeat proves that a worker lives, not that it gets on: what counts here is a job's latest event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from service.database import Database
from service.job import JobStatus
from service.job_rows import UNFINISHED
from service.tables import epoch_now, job_events, jobs

PAUSED = "paused"
STATES = (JobStatus.QUEUED.value, PAUSED, JobStatus.RUNNING.value)


@dataclass(frozen=True)
class JobBacklog:
    """Both by state: queued (a worker may claim it), paused or running."""

    num_jobs: Mapping[str, int]
    max_silence_seconds: Mapping[str, float]
    """Since the latest event of the job whose latest event is oldest; states without jobs are missing."""


def job_backlog(database: Database) -> JobBacklog:
    with database.read() as connection:
        rows = connection.execute(_stalest_by_state()).all()
    found = {row.state: row for row in rows}
    return JobBacklog(
        {state: found[state].num_jobs if state in found else 0 for state in STATES},
        {state: max(0.0, float(row.silence)) for state, row in found.items()},
    )


def _stalest_by_state() -> sa.Select[tuple[str, int, float]]:
    latest = sa.select(sa.func.max(job_events.c.created_at)).where(job_events.c.job_id == jobs.c.id).scalar_subquery()
    queued_and_paused = sa.and_(jobs.c.state == JobStatus.QUEUED, jobs.c.paused)
    unfinished = (
        sa.select(
            sa.case((queued_and_paused, PAUSED), else_=jobs.c.state).label("state"),
            sa.func.coalesce(latest, jobs.c.created_at).label("heard_at"),
        )
        .where(jobs.c.state.in_(UNFINISHED))
        .subquery()
    )
    silence = epoch_now() - sa.func.min(unfinished.c.heard_at)
    return sa.select(unfinished.c.state, sa.func.count().label("num_jobs"), silence.label("silence")).group_by(
        unfinished.c.state
    )
