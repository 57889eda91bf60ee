"""The thread that puts proposals together: examples, files, data report, estimate. Decides only what the policy says.

Every step ends in one fenced write, so a crash repeats a step, and two services on one database do no harm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import Any, Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from adapters.dataset import MIN_EXAMPLES
from adapters.errors import AdapterError
from adapters.thread_priority import lower_priority
from service.data_reports import FileReport
from service.database import database_now, lock_tenant
from service.errors import DeadlineExceededError, NotFoundError, RateLimitError, ServiceError, UnavailableError
from service.estimates import JobEstimate
from service.files import File, Files, insert_file
from service.job import JobSpec, Method
from service.retraining import Retraining
from service.retraining_data import BuiltFiles, Material, Original, RetrainingFiles, count_corrected, enough, gather
from service.retraining_rows import Proposal, ProposalState, add_event, collect_again, expire_files, move, proposals_in
from service.tables import epoch_now, jobs, quality_streams, retraining_proposals
from service.tenant_settings import choices_of
from service.versions import find_version

log = structlog.get_logger("service.retraining")

POLL_SECONDS = 30.0
MAX_ATTEMPTS = 5
MIN_FILE_SECONDS = 60


class _Stopped(Exception):
    """The service ends."""


class _OutrunError(Exception):
    """The proposal changed while it was worked on."""


@dataclass(frozen=True)
class _Background:
    """What a proposal's model comes from: whose corrections belong to it, and which of them it knows already."""

    models: tuple[str, ...]
    since: float
    original: Original | None


class Estimating(Protocol):
    """The part of `Estimates` that is needed here."""

    def make(self, tenant_id: str, spec: JobSpec) -> JobEstimate: ...


class Reporting(Protocol):
    """The part of `DataReports` that is needed here."""

    def submit(self, tenant_id: str, training: File, validation: File | None = None) -> Future[FileReport]: ...


class RetrainingWorker:
    """`start` it once; `stop` waits for the step that runs. `work` is one round, for whoever has no thread."""

    def __init__(
        self,
        retraining: Retraining,
        files: Files,
        builder: RetrainingFiles,
        data_reports: Reporting,
        estimates: Estimating,
        *,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._retraining = retraining
        self._database = retraining.database
        self._files = files
        self._builder = builder
        self._data_reports = data_reports
        self._estimates = estimates
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="retraining", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float = 30.0) -> None:
        self._stopping.set()
        self._retraining.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def work(self) -> None:
        """Bring everything as far as it goes now."""
        self._hear_of_quality()
        steps: tuple[tuple[ProposalState, Callable[[Proposal], None]], ...] = (
            (ProposalState.INSUFFICIENT, self._look_again),
            (ProposalState.COLLECTING, self._collect),
            (ProposalState.CHECKING, self._check),
            (ProposalState.PROPOSED, self._offer),
        )
        for state, step in steps:
            with self._database.read() as connection:
                waiting = proposals_in(connection, state)
            for proposal in waiting:
                self._try(step, proposal)

    def _loop(self) -> None:
        lower_priority()
        while not self._stopping.is_set():
            try:
                self.work()
            except _Stopped:
                return
            except Exception:  # the database is away, say: the worker outlives it
                log.exception("retraining_worker_failed")
            self._retraining.due.wait(self._poll_seconds)
            self._retraining.due.clear()
            self._stopping.wait(0.2)  # let several wishes come together

    def _try(self, step: Callable[[Proposal], None], proposal: Proposal) -> None:
        try:
            step(proposal)
        except _Stopped:
            raise
        except (_OutrunError, RateLimitError, UnavailableError) as error:  # the next round sees it as it is then
            log.info("retraining_postponed", retraining=proposal.id, reason=type(error).__name__)
        except (ServiceError, AdapterError) as error:
            self._fail(proposal, error.code or "retraining_failed", error.message)
        except Exception:
            log.exception("retraining_step_failed", retraining=proposal.id)
            if proposal.attempts + 1 >= MAX_ATTEMPTS:
                self._fail(proposal, "internal_error", "The proposal could not be made because of an internal error.")

    # -- steps ------------------------------------------------------------------------------------------------

    def _hear_of_quality(self) -> None:
        c = quality_streams.c
        untold = sa.select(c.tenant_id, c.model, c.reason).where(c.fell_at.is_not(None), c.told_at.is_(None))
        with self._database.read() as connection:
            fallen = connection.execute(untold).all()
        for row in fallen:
            self._retraining.quality_fell(row.tenant_id, row.model, row.reason)
            with self._database.begin() as connection:
                mine = sa.and_(c.tenant_id == row.tenant_id, c.model == row.model)
                connection.execute(quality_streams.update().where(mine).values(told_at=epoch_now()))

    def _look_again(self, proposal: Proposal) -> None:
        """Enough may have been corrected since. What was looked at already does not count again."""
        with self._database.read() as connection:
            seen = self._seen(connection, proposal, self._background(connection, proposal))
        if seen >= MIN_EXAMPLES and seen != (proposal.counts or {}).get("seen"):
            self._again(proposal, "more corrections have come in.")

    def _collect(self, proposal: Proposal) -> None:
        proposal = self._attempt(proposal)
        with self._database.read() as connection:
            background = self._background(connection, proposal)
            seen = self._seen(connection, proposal, background)
            material = gather(
                connection,
                proposal.tenant_id,
                models=background.models,
                alias=proposal.alias,
                since=background.since,
                options=proposal.options,
            )
            missing = _missing(material, choices_of(connection, proposal.tenant_id).capture)
        if missing is not None:
            counts = {**material.counts.as_dict(), "seen": seen}
            self._move(proposal, ProposalState.INSUFFICIENT, missing, missing=missing, counts=counts, attempts=0)
            return
        original = self._original(proposal, background)
        built = self._builder.build(
            proposal.tenant_id, f"retraining-{proposal.id.rpartition('-')[2][:8]}", material, original, self._breathe
        )
        try:
            self._publish(proposal, material, built, original)
        except BaseException:
            self._builder.discard(built)
            raise

    def _publish(self, proposal: Proposal, material: Material, built: BuiltFiles, original: Original | None) -> None:
        with self._database.begin() as connection:
            lock_tenant(connection, proposal.tenant_id)
            until = material.texts_until or 0.0
            seconds = max(MIN_FILE_SECONDS, int(until - database_now(connection)))
            for staged in (built.training, built.validation):
                insert_file(connection, staged, expires_after_seconds=seconds)
            counts = built.counts
            told = f"Collected {counts.corrected} corrected and {counts.rated} well-rated answers"
            told += f", with {counts.original} examples of the original file." if original else "."
            self._move_in(
                connection,
                proposal,
                ProposalState.CHECKING,
                told,
                counts=counts.as_dict(),
                training_file=built.training.id,
                validation_file=built.validation.id,
                original_job=None if original is None else original.job_id,
                collected_at=epoch_now(),
                texts_until=until,
                missing=None,
                attempts=0,
            )

    def _check(self, proposal: Proposal) -> None:
        if not self._has_files(proposal):
            return
        proposal = self._attempt(proposal)
        report = self._report(proposal)
        estimate = self._estimates.make(proposal.tenant_id, self._retraining.spec_of(proposal))
        values = {"report": report, "estimate": estimate.as_dict(), "attempts": 0}
        self._move(proposal, ProposalState.PROPOSED, "The data were reported on: ready to be approved.", **values)

    def _offer(self, proposal: Proposal) -> None:
        if self._has_files(proposal):
            self._retraining.start_by_policy(proposal)

    # -- what they are made of --------------------------------------------------------------------------------

    def _background(self, connection: Connection, proposal: Proposal) -> _Background:
        version = find_version(connection, proposal.tenant_id, proposal.model)
        if version is None:
            return _Background((proposal.model,), 0.0, None)
        parents = (version.provenance or {}).get("parents", ())
        models = (version.id, *(parent["model"] for parent in parents if parent["model"] is not None))
        if version.job_id is None:
            return _Background(models, 0.0, None)
        c = retraining_proposals.c
        query = sa.select(c.collected_at, c.original_job).where(c.job_id == version.job_id)
        made_by = connection.execute(query).one_or_none()
        job_id = version.job_id if made_by is None else made_by.original_job
        since = 0.0 if made_by is None else made_by.collected_at or 0.0
        return _Background(models, since, None if job_id is None else _job(connection, proposal.tenant_id, job_id))

    def _seen(self, connection: Connection, proposal: Proposal, background: _Background) -> int:
        return count_corrected(
            connection,
            proposal.tenant_id,
            models=background.models,
            alias=proposal.alias,
            since=background.since,
        )

    def _original(self, proposal: Proposal, background: _Background) -> Original | None:
        """What the first parent learned from, if it is wanted, there, and of the same kind."""
        original = background.original
        if original is None or not proposal.options.include_original or original.spec.method is not Method.SUPERVISED:
            return None
        return original if self._builder.has(proposal.tenant_id, original.spec) else None

    def _report(self, proposal: Proposal) -> dict[str, Any] | None:
        """A report is advice: without one the proposal stands all the same."""
        assert proposal.training_file is not None and proposal.validation_file is not None
        made_of = (self._files.get(proposal.tenant_id, id) for id in (proposal.training_file, proposal.validation_file))
        training, validation = made_of
        future = self._data_reports.submit(proposal.tenant_id, training, validation)
        while True:
            try:
                return future.result(0.2).report.as_dict()
            except FutureTimeoutError:
                self._breathe()
            except DeadlineExceededError:
                return None

    def _has_files(self, proposal: Proposal) -> bool:
        """Files that the tenant deleted, or whose time was up, are made again."""
        try:
            for file_id in (proposal.training_file, proposal.validation_file):
                self._files.get(proposal.tenant_id, str(file_id))
        except NotFoundError:
            self._again(proposal, "its files are gone.")
            return False
        return True

    def _breathe(self) -> None:
        if self._stopping.is_set():
            raise _Stopped

    # -- writes -----------------------------------------------------------------------------------------------

    def _attempt(self, proposal: Proposal) -> Proposal:
        """Count a try before it: what takes the process down with it is not tried for ever."""
        if proposal.attempts >= MAX_ATTEMPTS:
            self._fail(proposal, "internal_error", "The proposal could not be made: the service was lost each time.")
            raise _OutrunError
        with self._database.begin() as connection:
            if not move(connection, proposal, proposal.state, attempts=proposal.attempts + 1):
                raise _OutrunError
        return replace(proposal, revision=proposal.revision + 1, attempts=proposal.attempts + 1)

    def _move(self, proposal: Proposal, state: ProposalState, message: str, **values: Any) -> None:
        with self._database.begin() as connection:
            self._move_in(connection, proposal, state, message, **values)
        if state is not ProposalState.CHECKING:
            self._retraining.observer.retraining_moved(proposal.trigger, state)

    def _move_in(
        self, connection: Connection, proposal: Proposal, state: ProposalState, message: str, **values: Any
    ) -> None:
        if not move(connection, proposal, state, **values):
            raise _OutrunError
        add_event(connection, proposal.id, message)

    def _again(self, proposal: Proposal, reason: str) -> None:
        with self._database.begin() as connection:
            collect_again(connection, proposal.id, reason)
        self._retraining.wake()

    def _fail(self, proposal: Proposal, code: str, message: str) -> None:
        """As it is now: the step may have written before it failed."""
        with self._database.begin() as connection:
            now = [p for p in proposals_in(connection, proposal.state) if p.id == proposal.id]
            error = {"code": code, "message": message}
            if not now or not move(connection, now[0], ProposalState.FAILED, error=error, ended_at=epoch_now()):
                return
            expire_files(connection, now[0].training_file, now[0].validation_file)
            add_event(connection, proposal.id, message)
        self._retraining.observer.retraining_moved(proposal.trigger, ProposalState.FAILED)


def _missing(material: Material, captures: bool) -> str | None:
    """What a proposal lacks, and the way out."""
    if not captures:
        return (
            "Nothing is captured: turn 'capture' on with PUT /v1/settings, then correct answers with POST /v1/feedback"
            ' {"completion_id", "corrected"}.'
        )
    if enough(material):
        return None
    counts = material.counts
    known = counts.corrected - counts.new_corrected
    also = f" ({known} more are known to the model already)" if known else ""
    return (
        f"{counts.new_corrected} of at least {MIN_EXAMPLES} corrected answers are there{also}: send more with"
        ' POST /v1/feedback {"completion_id", "corrected"}, about different prompts that were captured.'
    )


def _job(connection: Connection, tenant_id: str, job_id: str) -> Original | None:
    query = sa.select(jobs.c.spec).where(jobs.c.tenant_id == tenant_id, jobs.c.id == job_id)
    spec = connection.execute(query).scalar()
    return None if spec is None else Original(job_id, JobSpec.from_dict(spec))
