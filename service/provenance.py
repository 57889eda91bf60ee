"""What is noted of an adapter when it is published, and kept with its version for good. Knows rows, not tensors.

It stands in the version's row and not in the adapter's directory: the digest names what was learned and nothing else,
so that the same data, base and seed give the same digest whenever and in whatever job they are trained. A job's note is
made of the facts of its run (`service.run_facts`) and, here, of what only the database knows; an import's of what
arrived (`service.adapter_import`). Both are copies: files, parents and the job may be deleted afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.job import Job
from service.tables import adapter_versions, jobs

FORMAT = 1
"""Of the note; raised when what is noted changes its meaning."""


def with_history(connection: Connection, job: Job, facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The facts of a run, the job's resolved hyperparameters and data report, and where its parents came from."""
    if facts is None:
        return None
    wanted = [jobs.c[name] for name in ("resolved", "data_report") if name in jobs.c]
    row = connection.execute(sa.select(*wanted).where(jobs.c.id == job.id)).one()
    return {
        "format": FORMAT,
        **facts,
        "resolved": row.resolved,
        "data_report": getattr(row, "data_report", None),
        "parents": _parents(connection, job),
    }


def _parents(connection: Connection, job: Job) -> list[dict[str, str | None]]:
    """Nearest first: the adapter that the run went on from, that one's own parent, …"""
    digest = job.spec.parent_digest
    if digest is None:
        return []
    mine = sa.and_(adapter_versions.c.tenant_id == job.tenant_id, adapter_versions.c.digest == digest)
    named_so = adapter_versions.c.id == job.spec.model
    is_checkpoint = adapter_versions.c.step.is_not(None)  # the last one is often the published model's very bytes
    order = (named_so.desc(), is_checkpoint, adapter_versions.c.seq)
    query = sa.select(adapter_versions).where(mine).order_by(*order).limit(1)
    row = connection.execute(query).one_or_none()
    if row is None:
        return [{"model": None, "digest": digest}]
    return [{"model": row.id, "digest": digest}, *(row.provenance or {}).get("parents", [])]
