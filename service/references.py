"""What of the storage is still needed, as rows say it. Knows no file system.

An adapter is needed by a version, by a job that starts from it, by a merge, or by a canary or shadow that runs. Every
target that an alias, an experiment or a rollback can reach is a version: one that was deleted is none any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.job_rows import UNFINISHED
from service.tables import adapter_versions, experiments, files, jobs, merges


@dataclass(frozen=True)
class References:
    """`resume_points` are references as `ResumePoints.load` takes them; `unfinished_jobs` may still write new ones."""

    digests: frozenset[str]
    storage_keys: frozenset[str]
    unfinished_jobs: frozenset[str]
    resume_points: frozenset[str]


def references(connection: Connection) -> References:
    """All of them, of one moment where the transaction is one."""
    unfinished = jobs.c.state.in_(UNFINISHED)
    points = sa.select(jobs.c.resume_point).where(unfinished, jobs.c.resume_point.is_not(None))
    return References(
        frozenset(row.digest for row in connection.execute(_digests())),
        frozenset(connection.execute(sa.select(files.c.storage_key)).scalars()),
        frozenset(connection.execute(sa.select(jobs.c.id).where(unfinished)).scalars()),
        frozenset(connection.execute(points).scalars()),
    )


def needed(connection: Connection, digest: str) -> bool:
    """Whether any row needs this adapter."""
    found = _digests().subquery()
    return connection.execute(sa.select(found.c.digest).where(found.c.digest == digest).limit(1)).first() is not None


def hold_new_references(connection: Connection) -> None:
    """Until this transaction ends no version is published, and those that were about to be are waited for.

    A publisher that committed its row therefore finds out, by a look at the store afterwards, whether it was swept.
    Jobs, merges and experiments only ever begin to need what is a version's; so one table is enough, and whoever locks
    no second one waits in no circle. On SQLite a write transaction alone does it.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"LOCK TABLE {adapter_versions.name} IN SHARE MODE")


def _digests() -> sa.CompoundSelect[tuple[str]]:
    running = experiments.c.outcome.is_(None)
    return sa.union(
        sa.select(adapter_versions.c.digest),
        sa.select(jobs.c.parent_digest).where(jobs.c.parent_digest.is_not(None), jobs.c.state.in_(UNFINISHED)),
        sa.select(merges.c.digest).where(merges.c.state.in_(("queued", "running"))),
        sa.select(experiments.c.digest).where(running),
        sa.select(experiments.c.stable_digest).where(running),
    )
