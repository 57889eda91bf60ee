"""What must hold after any number of kills, looked up in database and files themselves. Knows no HTTP and no kill.

`structure` holds at any moment, also between a kill and the next start; `outcome` when every job has ended.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import AdapterError, StoreError
from adapters.store import AdapterStore
from service.database import Database
from service.job import JobStatus
from service.resume_points import ResumePoints
from service.tables import adapter_versions, alias_moves, aliases, files, job_events, jobs, usage_hours

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
FILE_NAME = re.compile(r"file-[a-z0-9]{24}")


@dataclass(frozen=True)
class Expected:
    """What a recipe's job ends with, undisturbed."""

    digest: str
    trained_tokens: int


@dataclass
class Findings:
    violations: list[str] = field(default_factory=list)
    garbage: Counter[str] = field(default_factory=Counter)
    """What nobody refers to any more, by kind; a collector may remove it."""


class Invariants:
    """`storage` is the folder of files, adapters and training states."""

    def __init__(self, database: Database, storage: Path) -> None:
        self._database = database
        self._storage = storage

    def structure(self) -> Findings:
        found = Findings()
        store = AdapterStore(str(self._storage / "adapters"), self._storage / "unused")  # has verified nothing yet
        with self._database.read() as connection:
            if self._database.is_sqlite:
                said = connection.exec_driver_sql("PRAGMA integrity_check").scalar()
                found.violations += [] if said == "ok" else [f"SQLite: {said}"]
            _check_adapters(connection, store, self._storage / "adapters" / "sha256", found)
            _check_files(connection, self._storage / "files", found)
            _check_states(connection, self._storage, found)
            _check_aliases(connection, found)
            _check_books(connection, found)
        return found

    def outcome(self, expected: dict[int, Expected]) -> Findings:
        found = self.structure()
        with self._database.read() as connection:
            for job in connection.execute(sa.select(jobs)):
                _check_job(connection, job, expected[job.spec["seed"]], found)
        return found


def _check_adapters(connection: Connection, store: AdapterStore, root: Path, found: Findings) -> None:
    """A row has its artifact, an artifact is whole."""
    versions = {row.id: row.digest for row in connection.execute(sa.select(adapter_versions))}
    present = {path.name for path in root.iterdir()} if root.is_dir() else set()
    for version, digest in versions.items():
        if digest not in present:
            found.violations.append(f"{version} has no adapter {digest}")
    for name in present:
        if TEMPORARY.fullmatch(name):
            found.garbage["unfinished adapters"] += 1
            continue
        try:
            store.read(name)
        except (AdapterError, StoreError) as error:
            found.violations.append(f"adapter {name}: {error.message}")
        if name not in versions.values():
            found.garbage["adapters without a version"] += 1


def _check_files(connection: Connection, root: Path, found: Findings) -> None:
    known = {row.storage_key: row for row in connection.execute(sa.select(files))}
    for key, row in known.items():
        path = root / key
        if not path.is_file():
            found.violations.append(f"file {row.id} has no content")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != row.sha256:
            found.violations.append(f"file {row.id} is not what was written")
    for path in root.glob("*/*"):
        if TEMPORARY.fullmatch(path.name):
            found.garbage["unfinished files"] += 1
        elif f"{path.parent.name}/{path.name}" not in known:
            if not FILE_NAME.fullmatch(path.name):
                found.violations.append(f"{path} is nothing that the service writes")
            found.garbage["files without a row"] += 1


def _check_states(connection: Connection, storage: Path, found: Findings) -> None:
    rows = {row.id: row for row in connection.execute(sa.select(jobs.c.id, jobs.c.state, jobs.c.resume_point))}
    points = ResumePoints(str(storage))
    for row in rows.values():
        if row.resume_point is not None and not JobStatus(row.state).final:
            try:
                points.load(row.resume_point)
            except StoreError as error:
                found.violations.append(f"{row.id}: {error.message}")
    for path in (storage / "training").glob("*/*"):
        if TEMPORARY.fullmatch(path.name):
            found.garbage["unfinished states"] += 1
        elif path.parent.name not in rows or not re.fullmatch(r"attempt-\d{6}\.pt", path.name):
            found.violations.append(f"{path} is nothing that the service writes")
        elif JobStatus(rows[path.parent.name].state).final:
            found.garbage["states of jobs that ended"] += 1


def _check_aliases(connection: Connection, found: Findings) -> None:
    """A pointer is the newest move, and says a model that is there."""
    last = sa.func.max(alias_moves.c.seq).label("last")
    newest = {
        (row.tenant_id, row.alias): row.last
        for row in connection.execute(
            sa.select(alias_moves.c.tenant_id, alias_moves.c.alias, last).group_by(
                alias_moves.c.tenant_id, alias_moves.c.alias
            )
        )
    }
    pointers = {(row.tenant_id, row.name): row.move for row in connection.execute(sa.select(aliases))}
    if pointers != newest:
        found.violations.append(f"aliases point to {pointers}, the newest moves are {newest}")
    gone = sa.select(alias_moves.c.model).where(alias_moves.c.model.not_in(sa.select(adapter_versions.c.id)))
    found.violations += [f"an alias was moved to {model}, which is not there" for model in
                         connection.execute(gone).scalars()]  # fmt: skip


def _check_books(connection: Connection, found: Findings) -> None:
    """The hours' sums are what the jobs say that was booked for them, and no more than was trained."""
    booked = dict(
        connection.execute(
            sa.select(usage_hours.c.tenant_id, sa.func.sum(usage_hours.c.training_tokens))
            .where(usage_hours.c.training_tokens > 0)
            .group_by(usage_hours.c.tenant_id)
        ).all()
    )
    of_jobs = dict(
        connection.execute(
            sa.select(jobs.c.tenant_id, sa.func.sum(jobs.c.booked_tokens))
            .where(jobs.c.booked_tokens > 0)
            .group_by(jobs.c.tenant_id)
        ).all()
    )
    if {k: int(v) for k, v in booked.items()} != {k: int(v) for k, v in of_jobs.items()}:
        found.violations.append(f"training tokens in the books {booked}, of the jobs {of_jobs}")


def _check_job(connection: Connection, job: Any, expected: Expected, found: Findings) -> None:
    if not JobStatus(job.state).final:
        found.violations.append(f"{job.id} is still {job.state}")
    mine = sa.select(adapter_versions).where(adapter_versions.c.job_id == job.id, adapter_versions.c.step.is_(None))
    published = connection.execute(mine).all()
    if (job.state == JobStatus.SUCCEEDED) != (len(published) == 1):
        found.violations.append(f"{job.id} is {job.state} with {len(published)} versions")
    if job.state == JobStatus.FAILED:
        found.violations.append(f"{job.id} failed: {job.error}")
    if job.booked_tokens > expected.trained_tokens:
        found.violations.append(f"{job.id}: {job.booked_tokens} tokens booked, all are {expected.trained_tokens}")
    if job.state != JobStatus.SUCCEEDED or len(published) != 1:
        return
    if published[0].digest != expected.digest:
        found.violations.append(f"{job.id} learned {published[0].digest}, undisturbed it is {expected.digest}")
    if not job.booked_tokens == job.trained_tokens == expected.trained_tokens:
        found.violations.append(f"{job.id}: trained {job.trained_tokens}, booked {job.booked_tokens}")
    gate = (published[0].metrics.get("evaluation") or {}).get("gate") or {}
    moves = sa.select(sa.func.count()).where(
        alias_moves.c.model == published[0].id, alias_moves.c.alias == "best", alias_moves.c.kind == "published"
    )
    moved = connection.execute(moves).scalar_one()
    if moved != bool(gate.get("alias_moved")):
        found.violations.append(f"{job.id}: the gate says alias_moved={gate.get('alias_moved')}, {moved} moves")


def taken_up_again(database: Database) -> tuple[int, int]:
    """How often a job went on from its state, and how often it was taken up again at all."""
    count = sa.select(sa.func.count()).select_from(job_events)
    with database.read() as connection:
        resumed = connection.execute(count.where(job_events.c.message.like("Resuming from step%"))).scalar_one()
        again = connection.execute(count.where(job_events.c.message.like("%taken up again%"))).scalar_one()
    return resumed, again
