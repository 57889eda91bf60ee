"""Forgetting captured texts wherever they went: captures, corrections, files made of them, excerpts in reports.

What was learned stays learned: an adapter trained on a text is deleted with `DELETE /v1/models`, not here. A job that
still learns from withdrawn texts is cancelled. Knows rows; the files' content goes when `Files.remove_expired` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.captures import DAY, days_of, too_old, user_digest
from service.job import EventLevel, JobStatus
from service.job_rows import UNFINISHED, ending, insert_event
from service.retraining_rows import add_event, collect_again, expire_files
from service.tables import (
    adapter_versions,
    captures,
    epoch_now,
    feedback,
    files,
    job_events,
    jobs,
    retraining_proposals,
)
from service.usage_rows import book_training

TEXT_KEYS = frozenset({"excerpts", "worst_examples"})
"""Where reports show pieces of examples."""

HARMLESS_RESULTS = ("step_metrics.csv",)


@dataclass(frozen=True)
class Forgotten:
    captures: int
    corrections: int


def forget(connection: Connection, tenant_id: str, user: str | None = None) -> Forgotten:
    """Everything of a tenant, or what one end user asked or corrected. The caller holds `lock_tenant`."""
    mine = captures.c.tenant_id == tenant_id
    corrected = sa.and_(feedback.c.tenant_id == tenant_id, feedback.c.corrected.is_not(None))
    if user is not None:
        digest = user_digest(tenant_id, user)
        mine = sa.and_(mine, captures.c.user_digest == digest)
        of_theirs = feedback.c.completion_id.in_(sa.select(captures.c.id).where(mine))
        corrected = sa.and_(corrected, sa.or_(feedback.c.user_digest == digest, of_theirs))
    num_corrected = connection.execute(feedback.update().where(corrected).values(corrected=None)).rowcount
    num_captures = connection.execute(captures.delete().where(mine)).rowcount
    _withdraw(connection, retraining_proposals.c.tenant_id == tenant_id, "Captured texts were withdrawn.", cancel=True)
    return Forgotten(num_captures, num_corrected)


def forget_old(connection: Connection, tenant_id: str | None = None) -> None:
    """What is past its tenant's days, of one tenant or of all."""
    of_tenant = [] if tenant_id is None else [captures.c.tenant_id == tenant_id]
    connection.execute(captures.delete().where(too_old(tenant_id), *of_tenant))
    of_tenant = [] if tenant_id is None else [feedback.c.tenant_id == tenant_id]
    old = feedback.c.updated_at < epoch_now() - days_of(feedback.c.tenant_id) * DAY
    connection.execute(
        feedback.update().where(feedback.c.corrected.is_not(None), old, *of_tenant).values(corrected=None)
    )
    c = retraining_proposals.c
    of_tenant = [] if tenant_id is None else [c.tenant_id == tenant_id]
    learning = sa.exists().where(jobs.c.id == c.job_id, jobs.c.state.in_(UNFINISHED))
    due = sa.and_(c.texts_until < epoch_now(), sa.not_(c.erased), sa.not_(learning), *of_tenant)
    _withdraw(connection, due, "The time for which captured texts are kept is over.", cancel=False)


def _withdraw(connection: Connection, which: sa.ColumnElement[bool], reason: str, *, cancel: bool) -> None:
    """What proposals made of captures. Those that nobody decided about are collected again, from what is left."""
    c = retraining_proposals.c
    query = sa.select(c.id, c.training_file, c.validation_file, c.report, c.job_id).where(which, sa.not_(c.erased))
    for row in connection.execute(query.order_by(c.seq)).all():
        expire_files(connection, row.training_file, row.validation_file)
        if collect_again(connection, row.id, reason):
            continue
        if row.job_id is not None:
            _forget_job(connection, row.job_id, reason, cancel=cancel)
        changed = {"report": _without_texts(row.report), "erased": True, "revision": c.revision + 1}
        connection.execute(retraining_proposals.update().where(c.id == row.id).values(changed))
        add_event(connection, row.id, reason)


def _forget_job(connection: Connection, job_id: str, reason: str, *, cancel: bool) -> None:
    job = connection.execute(
        sa.select(jobs.c.state, jobs.c.data_report, jobs.c.result_files).where(jobs.c.id == job_id)
    )
    row = job.one_or_none()
    if row is None:
        return
    if cancel and row.state in UNFINISHED:
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(**ending(JobStatus.CANCELLED)))
        book_training(connection, job_id)
        insert_event(connection, job_id, f"Fine-tuning job cancelled: {reason}", level=EventLevel.WARN)
    connection.execute(jobs.update().where(jobs.c.id == job_id).values(data_report=_without_texts(row.data_report)))
    results = sa.and_(files.c.id.in_(row.result_files), files.c.filename.not_in(HARMLESS_RESULTS))
    connection.execute(files.update().where(results).values(expires_at=epoch_now()))
    told = sa.select(job_events.c.seq, job_events.c.data).where(job_events.c.job_id == job_id)
    for event in connection.execute(told).all():
        if event.data is not None:
            cleaned = job_events.update().where(job_events.c.seq == event.seq)
            connection.execute(cleaned.values(data=_without_texts(event.data)))
    v = adapter_versions.c
    for version in connection.execute(sa.select(v.seq, v.metrics, v.provenance).where(v.job_id == job_id)).all():
        clean = {"metrics": _without_texts(version.metrics), "provenance": _without_texts(version.provenance)}
        connection.execute(adapter_versions.update().where(v.seq == version.seq).values(clean))


def _without_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: [] if key in TEXT_KEYS else _without_texts(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_texts(inner) for inner in value]
    return value
