"""The worker's side of fine-tuning jobs: claim, lease, fence, finish. Knows no HTTP and no tensors.

Every write is fenced: it touches the row only `WHERE id = ? AND attempt = ? AND state = 'running'`, and renews
the lease. Zero rows raise `FencedWriteError`: somebody else owns the job now, stop at once. When the reason is
that the client cancelled it (or the tenant is gone), the error is a `JobCancelledError`, which is not counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.steps import Reached, unwatched
from service.aliases import active_model
from service.database import Database, database_now, lock_tenant, new_id
from service.errors import NotFoundError
from service.files import StagedFile, insert_file
from service.job import Claim, Directive, EventLevel, EventType, GateDecision, JobStatus
from service.job_rows import ending, insert_event, job_of, select_jobs
from service.jobs import JobObserver
from service.promotion import promote
from service.provenance import with_history
from service.tables import adapter_versions, epoch_now, jobs
from service.usage_rows import book_training
from service.versions import AdapterVersion, find_version, insert_version

logger = logging.getLogger(__name__)

CLOCK_TOLERANCE_SECONDS = 5.0
"""Clocks that differ by less are taken for one."""


class FencedWriteError(Exception):
    """The claim is no longer valid: the lease ran out and another worker took the job."""


class ClaimEndedError(FencedWriteError):
    """The claim was ended on purpose, by this worker or by the client; nothing is wrong, and nothing counted."""


class JobCancelledError(ClaimEndedError):
    """The client cancelled the job, or the tenant is gone."""


class JobQueue:
    def __init__(
        self,
        database: Database,
        *,
        lease_seconds: float = 30.0,
        max_lost_leases: int = 3,
        observer: JobObserver | None = None,
        reached: Reached = unwatched,
    ) -> None:
        """A job whose workers vanish more than `max_lost_leases` times without a new resume point fails with
        `worker_lost`: it may be what kills them."""
        self._database = database
        self._lease_seconds = lease_seconds
        self._max_lost_leases = max_lost_leases
        self._observer = observer
        self._reached = reached
        self._seen: tuple[float, float] | None = None
        """The database's clock and ours, at the last claim."""

    def claim(self, worker: str) -> Claim | None:
        """A job that is queued and not paused, or whose lease has run out; attempt is raised.

        Of those whose tenant has the fewest jobs running, the oldest.
        """
        entered: list[JobStatus] = []
        with self._database.begin() as connection:
            self._mind_the_clock(connection)
            while (row := _next_claimable(connection)) is not None:
                num_lost = row.num_lost_leases + (row.state == JobStatus.RUNNING)
                if num_lost <= self._max_lost_leases:
                    break
                _give_up(connection, row.id, num_lost)
                entered.append(JobStatus.FAILED)
            if row is not None:
                self._take(connection, row, worker, num_lost)
                job = job_of(connection.execute(select_jobs().where(jobs.c.id == row.id)).one())
                entered.append(JobStatus.RUNNING)
                self._reached("claim.taken")
        if row is not None:
            self._reached("claim.committed")
        self._report(*entered)
        return None if row is None else Claim(job, job.attempt, worker, self._lease_seconds)

    def _mind_the_clock(self, connection: Connection) -> None:
        """Leases are dated by the database's clock. Where that was set since we last looked, forwards or back, or a
        lease is dated in the future, nobody can tell who is silent: whoever runs gets one lease from now on."""
        now, ticks = database_now(connection), time.monotonic()
        dated_ahead = jobs.c.lease_renewed_at > now + CLOCK_TOLERANCE_SECONDS
        was_set = self._seen is not None and abs(now - self._seen[0] - (ticks - self._seen[1])) > min(
            CLOCK_TOLERANCE_SECONDS, self._lease_seconds / 2
        )
        self._seen = (now, ticks)
        lease = {"lease_renewed_at": now, "lease_expires_at": now + self._lease_seconds}
        renewed = jobs.update().where(jobs.c.state == JobStatus.RUNNING, sa.true() if was_set else dated_ahead)
        if connection.execute(renewed.values(**lease)).rowcount and was_set:
            logger.warning("jobs.clock_was_set")

    def heartbeat(self, claim: Claim) -> Directive:
        """Renew the lease. CANCEL: stop, write nothing. PAUSE: save a resume point and `release`.

        A claim that this worker itself has ended answers CANCEL as well (the heartbeat came late). Raises
        FencedWriteError when another worker has the job.
        """
        try:
            with self._fenced(claim) as (_, paused):
                return Directive.PAUSE if paused else Directive.CONTINUE
        except ClaimEndedError:
            return Directive.CANCEL

    def files_validated(self, claim: Claim) -> None:
        """The files are fine: the job leaves `validating_files`. The claim goes on."""
        with self._fenced(claim, files_validated=True) as (connection, _):
            insert_event(connection, claim.job.id, "Files validated, moving job to queued state")

    def event(
        self,
        claim: Claim,
        message: str,
        *,
        level: EventLevel = EventLevel.INFO,
        type: EventType = EventType.MESSAGE,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        with self._fenced(claim) as (connection, _):
            insert_event(connection, claim.job.id, message, level=level, type=type, data=data)

    def progress(
        self,
        claim: Claim,
        *,
        trained_tokens: int | None = None,
        estimated_finish: float | None = None,
        resolved: Mapping[str, Any] | None = None,
        estimate: Mapping[str, Any] | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Write what is known by now; None leaves a column as it is. `estimated_finish` is unix seconds;
        `resolved` the hyperparameters that stand for "auto" (and any that a client may see); `tokens_per_second`
        tells later estimates how fast this base learns here."""
        known = {
            "trained_tokens": trained_tokens,
            "estimated_finish": estimated_finish,
            "tokens_per_second": tokens_per_second,
        }
        values: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
        if resolved is not None:
            values["resolved"] = dict(resolved)
        if estimate is not None:
            values["estimate"] = dict(estimate)
        with self._fenced(claim, **values):
            pass

    def save_data_report(self, claim: Claim, report: Mapping[str, Any]) -> None:
        """Keep what the job's files are like (`Jobs.data_report`)."""
        with self._fenced(claim, data_report=dict(report)):
            pass

    def checkpoint(
        self,
        claim: Claim,
        *,
        step: int,
        digest: str,
        base_fingerprint: str,
        metrics: Mapping[str, float | None],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """List a servable snapshot under `…:ckpt-step-{step}`. The same step again replaces the row."""
        model_id = claim.job.checkpoint_model_id(step)
        with self._fenced(claim, locks_tenant=True) as (connection, _):
            connection.execute(adapter_versions.delete().where(adapter_versions.c.id == model_id))
            version = _version(claim, model_id, digest, base_fingerprint, metrics, step)
            version = replace(version, provenance=with_history(connection, claim.job, provenance))
            insert_version(connection, version, checkpoint_id=new_id("ftckpt"))

    def save_resume_point(self, claim: Claim, reference: str, trained_tokens: int | None = None) -> None:
        """Remember where the training state lies (durably written before this call), and book what it holds."""
        with self._fenced(claim, resume_point=reference, num_lost_leases=0) as (connection, _):
            if trained_tokens is not None:
                book_training(connection, claim.job.id, trained_tokens)

    def release(self, claim: Claim) -> None:
        """Give the job back, unfinished: paused by the client, or this worker shuts down."""
        with self._fenced(claim, state=JobStatus.QUEUED, worker=None, lease_expires_at=None):
            pass
        self._report(JobStatus.QUEUED)

    def fail(self, claim: Claim, *, code: str, message: str, param: str | None = None) -> None:
        error = {"code": code, "message": message, "param": param}
        with self._fenced(claim, **ending(JobStatus.FAILED, error=error)) as (connection, _):
            book_training(connection, claim.job.id)
            insert_event(connection, claim.job.id, message, level=EventLevel.ERROR, data=error)
        self._report(JobStatus.FAILED)

    def succeed(
        self,
        claim: Claim,
        *,
        digest: str,
        base_fingerprint: str,
        metrics: Mapping[str, Any],
        trained_tokens: int,
        result_files: Sequence[StagedFile] = (),
        gate: GateDecision | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> str:
        """ONE transaction: result files, adapter version, the alias the spec names, and the job row.

        The alias moves unless `gate` is against it; what came of it joins `metrics["evaluation"]["gate"]`.
        Returns the fine-tuned model's id (`claim.job.model_id`). `digest` is durable in the store already.
        """
        job, model_id = claim.job, claim.job.model_id
        ended = ending(
            JobStatus.SUCCEEDED,
            files_validated=True,
            fine_tuned_model=model_id,
            trained_tokens=trained_tokens,
            result_files=[file.id for file in result_files],
        )
        with self._fenced(claim, locks_tenant=True, **ended) as (connection, _):
            self._reached("pointer.fenced")
            for file in result_files:
                insert_file(connection, file)
            decided = promote(connection, job, model_id, gate)
            self._reached("pointer.alias")
            if decided is not None:
                metrics = {**metrics, "evaluation": {**(metrics.get("evaluation") or {}), "gate": decided}}
            version = _version(claim, model_id, digest, base_fingerprint, metrics, None)
            insert_version(connection, replace(version, provenance=with_history(connection, job, provenance)))
            book_training(connection, job.id, trained_tokens)
            insert_event(connection, job.id, f"New fine-tuned model created: {model_id}")
            insert_event(connection, job.id, "The job has successfully completed")
            self._reached("pointer.written")
        self._reached("pointer.committed")
        self._report(JobStatus.SUCCEEDED)
        return model_id

    def active_version(self, claim: Claim) -> AdapterVersion | None:
        """What the alias that the job names points at now."""
        job = claim.job
        if job.spec.alias is None:
            return None
        with self._database.read() as connection:
            model = active_model(connection, job.tenant_id, job.spec.alias)
            return None if model is None else find_version(connection, job.tenant_id, model)

    def exists(self, job_id: str) -> bool:
        """Not after its tenant was deleted."""
        with self._database.read() as connection:
            return connection.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id)).scalar() is not None

    def without_version(self, digests: Sequence[str]) -> list[str]:
        """Those that no row speaks of."""
        query = sa.select(adapter_versions.c.digest).where(adapter_versions.c.digest.in_(digests))
        with self._database.read() as connection:
            used = set(connection.execute(query).scalars())
        return [digest for digest in digests if digest not in used]

    def parent_is_of(self, claim: Claim, base_fingerprint: str) -> bool:
        """Whether a version of the tenant's that the job starts from belongs to this base; also when there is none."""
        v = adapter_versions.c
        mine = sa.and_(v.tenant_id == claim.job.tenant_id, v.digest == claim.job.spec.parent_digest)
        with self._database.read() as connection:
            found = set(connection.execute(sa.select(v.base_fingerprint).where(mine)).scalars())
        return not found or base_fingerprint in found

    def max_lease_age_seconds(self) -> float:
        """Seconds since the stalest running job's last heartbeat; 0 when none runs."""
        oldest = sa.func.min(jobs.c.lease_renewed_at)
        query = sa.select(epoch_now() - oldest).where(jobs.c.state == JobStatus.RUNNING)
        with self._database.read() as connection:
            age = connection.execute(query).scalar()
        return 0.0 if age is None else max(0.0, float(age))

    @contextmanager
    def _fenced(self, claim: Claim, *, locks_tenant: bool = False, **values: Any) -> Iterator[tuple[Connection, bool]]:
        """A transaction that starts with the fenced write of the job row; yields whether the job is paused."""
        try:
            with self._database.begin() as connection:
                if locks_tenant:
                    _lock_tenant_of(connection, claim)
                yield connection, self._renew(connection, claim, values)
        except ClaimEndedError:
            raise
        except FencedWriteError:
            if self._observer is not None:
                self._observer.write_fenced()
            raise

    def _renew(self, connection: Connection, claim: Claim, values: Mapping[str, Any]) -> bool:
        lease = {"lease_renewed_at": epoch_now(), "lease_expires_at": epoch_now() + self._lease_seconds}
        fence = sa.and_(jobs.c.id == claim.job.id, jobs.c.attempt == claim.attempt, jobs.c.state == JobStatus.RUNNING)
        update = jobs.update().where(fence).values(**{**lease, **values}).returning(jobs.c.paused)
        paused = connection.execute(update).scalar()
        if paused is None:
            raise _why_fenced(connection, claim)
        return bool(paused)

    def _take(self, connection: Connection, row: sa.Row[Any], worker: str, num_lost: int) -> None:
        connection.execute(
            jobs.update()
            .where(jobs.c.id == row.id)
            .values(
                state=JobStatus.RUNNING,
                attempt=row.attempt + 1,
                num_lost_leases=num_lost,
                worker=worker,
                lease_renewed_at=epoch_now(),
                lease_expires_at=epoch_now() + self._lease_seconds,
            )
        )
        if row.attempt > 0:
            insert_event(connection, row.id, f"Fine-tuning job taken up again (attempt {row.attempt + 1})")

    def _report(self, *states: JobStatus) -> None:
        if self._observer is not None:
            for state in states:
                self._observer.job_entered(state)


def _next_claimable(connection: Connection) -> Any:
    orphaned = sa.and_(jobs.c.state == JobStatus.RUNNING, jobs.c.lease_expires_at < epoch_now())
    others = jobs.alias("others")
    running = (
        sa.select(others.c.tenant_id, sa.func.count().label("num"))
        .where(others.c.state == JobStatus.RUNNING, others.c.lease_expires_at >= epoch_now())
        .group_by(others.c.tenant_id)
        .subquery("running")
    )
    query = (
        sa.select(jobs.c.id, jobs.c.state, jobs.c.attempt, jobs.c.num_lost_leases)
        .outerjoin_from(jobs, running, running.c.tenant_id == jobs.c.tenant_id)
        .where(sa.or_(jobs.c.state == JobStatus.QUEUED, orphaned), sa.not_(jobs.c.paused))
        .order_by(sa.func.coalesce(running.c.num, 0), jobs.c.seq)
        .limit(1)
        .with_for_update(skip_locked=True, of=jobs)
    )
    return connection.execute(query).one_or_none()


def _give_up(connection: Connection, job_id: str, num_lost: int) -> None:
    message = f"The worker running this job was lost {num_lost} times in a row; the job is not tried again."
    error = {"code": "worker_lost", "message": message, "param": None}
    connection.execute(jobs.update().where(jobs.c.id == job_id).values(**ending(JobStatus.FAILED, error=error)))
    insert_event(connection, job_id, message, level=EventLevel.ERROR, data=error)


def _why_fenced(connection: Connection, claim: Claim) -> FencedWriteError:
    query = sa.select(jobs.c.state, jobs.c.attempt).where(jobs.c.id == claim.job.id)
    row = connection.execute(query).one_or_none()
    name = f"job '{claim.job.id}', attempt {claim.attempt}"
    if row is None or (row.attempt == claim.attempt and row.state == JobStatus.CANCELLED):
        return JobCancelledError(f"{name}: cancelled")
    if row.attempt == claim.attempt:
        return ClaimEndedError(f"{name}: ended by this worker, {row.state}")
    return FencedWriteError(f"{name}: now attempt {row.attempt}, {row.state}")


def _lock_tenant_of(connection: Connection, claim: Claim) -> None:
    """Before the job row, in the order of whoever deletes a tenant, so that nobody waits in a circle."""
    try:
        lock_tenant(connection, claim.job.tenant_id)
    except NotFoundError:
        raise JobCancelledError(f"job '{claim.job.id}': its tenant was deleted") from None


def _version(
    claim: Claim,
    model_id: str,
    digest: str,
    base_fingerprint: str,
    metrics: Mapping[str, Any],
    step: int | None,
) -> AdapterVersion:
    return AdapterVersion(
        id=model_id,
        tenant_id=claim.job.tenant_id,
        digest=digest,
        job_id=claim.job.id,
        base_model=claim.job.spec.base_model,
        base_fingerprint=base_fingerprint,
        metrics=metrics,
        step=step,
    )
