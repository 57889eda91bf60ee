"""From drift, falling quality or a tenant's wish to a proposal to retrain, and from there to an ordinary job.

Decides; `service.retraining_worker` puts the data together. A target (an alias, or a model that none points at) has at
most one open proposal and at most one unfinished job of this kind; whatever triggers it again is noted with those.
Proposal and job begin together, in one transaction: a crash leaves a proposal that can be approved, or its one job.
Knows no HTTP and no texts.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, replace
from typing import Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from service.aliases import names_pointing_at
from service.database import Database, Page, database_now, lock_tenant, page_of
from service.drift_events import DriftEvent
from service.drift_states import DriftState
from service.errors import ConflictError, InvalidRequestError, NotFoundError, QuotaExceededError
from service.job import EvaluationSpec, Hyperparameters, Job, JobSpec, JobStatus, Method, Preset
from service.job_rows import UNFINISHED
from service.jobs import Idempotency, Jobs, queue_job
from service.registry import Registry
from service.retraining_rows import (
    OPEN,
    Proposal,
    ProposalEvent,
    ProposalState,
    RetrainingOptions,
    Trigger,
    add_event,
    events_of,
    expire_files,
    get_proposal,
    insert_proposal,
    move,
    open_proposal,
    proposal_of,
)
from service.tables import epoch_now, jobs, retraining_proposals
from service.tenant_settings import RetrainingPolicy, choices_of
from service.versions import AdapterVersion

log = structlog.get_logger("service.retraining")


class RetrainingObserver(Protocol):
    """Who counts. Called after the transaction that it reports."""

    def retraining_moved(self, trigger: str, outcome: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What came of a proposal's job. `alias_moved` is None while it runs, and where it follows no alias."""

    job: Job
    alias_moved: bool | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """What would be retrained: a model as it is now, and the alias that would follow."""

    model: str
    digest: str | None
    alias: str | None

    @property
    def name(self) -> str:
        return self.alias or self.model


class Retraining:
    def __init__(
        self,
        database: Database,
        registry: Registry,
        jobs: Jobs,
        observer: RetrainingObserver,
        *,
        cooldown_seconds: float = 24 * 3600.0,
    ) -> None:
        self.database = database
        self.observer = observer
        self.due = threading.Event()
        self._registry = registry
        self._jobs = jobs
        self._cooldown_seconds = cooldown_seconds

    def wake(self) -> None:
        """There may be something to do for the worker."""
        self.due.set()

    # -- triggers ---------------------------------------------------------------------------------------------

    def drift_changed(self, event: DriftEvent) -> None:
        """A listener of the drift watch. The same event again changes nothing; never raises for what is gone."""
        if event.state is DriftState.DRIFT:
            self._propose(event.tenant_id, event.model, Trigger.DRIFT, _why_drift(event))
        elif event.previous is DriftState.DRIFT:
            self._note(event.tenant_id, event.model, f"The signal '{event.signal}' is in state '{event.state}' again.")

    def quality_fell(self, tenant_id: str, model: str, reason: str) -> None:
        self._propose(tenant_id, model, Trigger.QUALITY, reason)

    def request(self, tenant_id: str, name: str, options: RetrainingOptions) -> Proposal:
        """By the tenant, whatever its policy is. Answers the open proposal of this target, if there is one.

        Raises NotFoundError for a model that is not there, BaseMismatchError for one of another base, ConflictError
        while a retraining of it runs, InvalidRequestError when nothing is captured.
        """
        target = self._target(tenant_id, name)
        with self.database.begin() as connection:
            lock_tenant(connection, tenant_id)
            if not choices_of(connection, tenant_id).capture:
                raise InvalidRequestError(
                    "There is nothing to learn from: turn 'capture' on with PUT /v1/settings, then correct answers with"
                    " POST /v1/feedback.",
                    code="capture_off",
                )
            running = _running(connection, tenant_id, target.name)
            if running is not None:
                raise ConflictError(
                    f"'{target.name}' is being retrained by job '{running.job_id}': wait for its end or cancel it.",
                    param="model",
                    code="retraining_running",
                )
            proposal = _open(connection, tenant_id, target, Trigger.REQUEST, "Asked for by the tenant.", options)
        self.wake()
        return proposal

    # -- the tenant's decisions -------------------------------------------------------------------------------

    def list(self, tenant_id: str, *, after: str | None, limit: int) -> Page[Proposal]:
        """Newest first."""
        query = sa.select(retraining_proposals).where(retraining_proposals.c.tenant_id == tenant_id)
        with self.database.read() as connection:
            rows, more = page_of(connection, query, retraining_proposals, after=after, limit=limit, descending=True)
        return Page(tuple(proposal_of(row) for row in rows), more)

    def get(self, tenant_id: str, proposal_id: str) -> Proposal:
        with self.database.read() as connection:
            return get_proposal(connection, tenant_id, proposal_id)

    def events(self, proposal: Proposal) -> tuple[ProposalEvent, ...]:
        """Newest first."""
        with self.database.read() as connection:
            return events_of(connection, proposal.id)

    def outcome(self, proposal: Proposal) -> Outcome | None:
        """None where no job was started."""
        if proposal.job_id is None:
            return None
        job = self._jobs.get(proposal.tenant_id, proposal.job_id)
        if job.state is not JobStatus.SUCCEEDED or job.fine_tuned_model is None:
            return Outcome(job, None, () if job.error is None else (job.error.message,))
        try:
            version = self._registry.version(proposal.tenant_id, job.fine_tuned_model)
        except NotFoundError:
            return Outcome(job, None, ("The model was deleted.",))
        gate = (version.metrics.get("evaluation") or {}).get("gate") or {}
        moved = bool(gate.get("alias_moved", True)) if proposal.alias is not None else None
        return Outcome(job, moved, tuple(gate.get("reasons", ())))

    def approve(self, tenant_id: str, proposal_id: str) -> Proposal:
        """Start its job. Again, it is no change. Raises ConflictError when there is nothing to approve yet or any more,
        and what creating a job raises."""
        proposal = self.get(tenant_id, proposal_id)
        if proposal.state is ProposalState.STARTED:
            return proposal
        if proposal.state is ProposalState.INSUFFICIENT:
            raise ConflictError(str(proposal.missing), param="retraining_id", code="not_enough_feedback")
        if proposal.state is not ProposalState.PROPOSED:
            raise _wrong_state(proposal, "approved")
        return self.start(proposal, "Approved by the tenant.")

    def dismiss(self, tenant_id: str, proposal_id: str) -> Proposal:
        """Its files go with it. Again, it is no change."""
        with self.database.begin() as connection:
            lock_tenant(connection, tenant_id)
            proposal = get_proposal(connection, tenant_id, proposal_id)
            if proposal.state is ProposalState.DISMISSED:
                return proposal
            if proposal.state not in OPEN:
                raise _wrong_state(proposal, "dismissed")
            _dismiss(connection, proposal, "Dismissed by the tenant.")
            dismissed = get_proposal(connection, tenant_id, proposal_id)
        self.observer.retraining_moved(proposal.trigger, ProposalState.DISMISSED)
        return dismissed

    # -- starting ---------------------------------------------------------------------------------------------

    def start(self, proposal: Proposal, reason: str) -> Proposal:
        """Queue the job of a proposal that is ready. Raises ConflictError when somebody was quicker or one runs."""
        spec = self.spec_of(proposal)
        with self.database.begin() as connection:
            lock_tenant(connection, proposal.tenant_id)
            running = _running(connection, proposal.tenant_id, proposal.target)
            if running is not None:
                raise ConflictError(
                    f"'{proposal.target}' is being retrained by job '{running.job_id}': wait for its end or cancel it.",
                    param="retraining_id",
                    code="retraining_running",
                )
            digest = hashlib.sha256(f"retraining\0{proposal.id}".encode()).hexdigest()
            job = queue_job(connection, proposal.tenant_id, spec, Idempotency(digest))
            started = {"job_id": job.id, "started_at": epoch_now(), "ended_at": epoch_now()}
            if not move(connection, proposal, ProposalState.STARTED, **started):
                raise _changed(proposal)  # rolls the job back, too
            add_event(connection, proposal.id, f"{reason} Job '{job.id}' was created.")
            done = get_proposal(connection, proposal.tenant_id, proposal.id)
        self._jobs.queued()
        self.observer.retraining_moved(proposal.trigger, ProposalState.STARTED)
        log.info("retraining_started", tenant=proposal.tenant_id, retraining=proposal.id, job=job.id)
        return done

    def start_by_policy(self, proposal: Proposal) -> None:
        """Where the tenant chose `auto`, the last start is long enough ago and nobody has to look at the data first."""
        c = retraining_proposals.c
        mine = sa.and_(c.tenant_id == proposal.tenant_id, c.target == proposal.target)
        with self.database.read() as connection:
            policy = choices_of(connection, proposal.tenant_id).retraining
            last = connection.execute(sa.select(sa.func.max(c.started_at)).where(mine)).scalar()
            waits = last is not None and database_now(connection) < last + self._cooldown_seconds
        if policy is not RetrainingPolicy.AUTO or waits:
            return
        if (proposal.report or {}).get("num_errors"):
            with self.database.begin() as connection:
                add_event(connection, proposal.id, "The data report has errors: not started by itself, approve it.")
            return
        try:
            self.start(proposal, "Started by the tenant's policy 'auto'.")
        except (ConflictError, QuotaExceededError) as error:
            log.info("retraining_waits", tenant=proposal.tenant_id, retraining=proposal.id, reason=error.code)

    def spec_of(self, proposal: Proposal) -> JobSpec:
        """The job: it goes on from the model, with the hyperparameters that made it, under the tenant's gate."""
        tenant_id = proposal.tenant_id
        model = self._registry.resolve(tenant_id, proposal.model)
        parent = None if model.is_base else self._parent_spec(self._registry.version(tenant_id, model.id))
        assert proposal.training_file is not None
        return JobSpec(
            model=model.id,
            base_model=self._registry.base.name,
            parent_digest=model.digest,
            training_file=proposal.training_file,
            validation_file=proposal.validation_file,
            seed=proposal.seed,
            suffix=proposal.options.suffix or (None if parent is None else parent.suffix),
            preset=Preset.STANDARD if parent is None else parent.preset,
            hyperparameters=_hyperparameters(parent),
            metadata={"retraining": proposal.id},
            alias=proposal.alias,
            evaluation=EvaluationSpec() if parent is None else replace(parent.evaluation, file=None),
            gate=self._jobs.gate_policies.get(tenant_id),
        )

    def _parent_spec(self, version: AdapterVersion) -> JobSpec | None:
        return None if version.job_id is None else self._jobs.get(version.tenant_id, version.job_id).spec

    def _propose(self, tenant_id: str, name: str, trigger: Trigger, reason: str) -> None:
        try:
            target = self._target(tenant_id, name)
            with self.database.begin() as connection:
                lock_tenant(connection, tenant_id)
                if choices_of(connection, tenant_id).retraining is RetrainingPolicy.OFF:
                    return
                running = _running(connection, tenant_id, target.name)
                if running is not None:
                    add_event(connection, running.id, reason)
                    return
                _open(connection, tenant_id, target, trigger, reason, RetrainingOptions())
        except NotFoundError:  # tenant or model were deleted meanwhile
            log.info("retraining_target_gone", tenant=tenant_id, model=name)
            return
        self.wake()

    def _note(self, tenant_id: str, name: str, message: str) -> None:
        try:
            target = self._target(tenant_id, name)
        except NotFoundError:
            return
        with self.database.begin() as connection:
            known = open_proposal(connection, tenant_id, target.name)
            if known is not None:
                add_event(connection, known.id, message)

    def _target(self, tenant_id: str, name: str) -> Target:
        """An alias, or a version with the first alias that points at it."""
        if name == self._registry.base.name:
            return Target(name, None, None)
        version = self._registry.version(tenant_id, name)
        self._registry.check_base(version)
        if version.id != name:
            return Target(version.id, version.digest, name)
        with self.database.read() as connection:
            names = names_pointing_at(connection, tenant_id, version.id)
        return Target(version.id, version.digest, names[0] if names else None)


def _open(
    connection: Connection, tenant_id: str, target: Target, trigger: Trigger, reason: str, options: RetrainingOptions
) -> Proposal:
    """The open proposal of the target, or a new one. One made for what the alias pointed at before gives way."""
    known = open_proposal(connection, tenant_id, target.name)
    if known is not None and known.model == target.model:
        add_event(connection, known.id, reason)
        return known
    if known is not None:
        _dismiss(connection, known, f"'{target.name}' points at '{target.model}' now.")
    proposal_id = insert_proposal(
        connection,
        tenant_id,
        model=target.model,
        digest=target.digest,
        alias=target.alias,
        trigger=trigger,
        reason=reason,
        options=options,
    )
    return get_proposal(connection, tenant_id, proposal_id)


def _dismiss(connection: Connection, proposal: Proposal, reason: str) -> None:
    if not move(connection, proposal, ProposalState.DISMISSED, ended_at=epoch_now()):
        raise _changed(proposal)
    expire_files(connection, proposal.training_file, proposal.validation_file)
    add_event(connection, proposal.id, reason)


def _running(connection: Connection, tenant_id: str, target: str) -> Proposal | None:
    """A proposal of the target whose job is not done."""
    c = retraining_proposals.c
    joined = retraining_proposals.join(jobs, jobs.c.id == c.job_id)
    mine = sa.and_(c.tenant_id == tenant_id, c.target == target, jobs.c.state.in_(UNFINISHED))
    row = connection.execute(sa.select(retraining_proposals).select_from(joined).where(mine).limit(1)).one_or_none()
    return None if row is None else proposal_of(row)


def _hyperparameters(parent: JobSpec | None) -> Hyperparameters:
    """Those of the job that made the parent; a job that learned from pairs had others."""
    return Hyperparameters() if parent is None or parent.method is not Method.SUPERVISED else parent.hyperparameters


def _why_drift(event: DriftEvent) -> str:
    figures = ""
    if event.statistic is not None and event.threshold is not None:
        figures = f" ({event.statistic:.3g}, threshold {event.threshold:.3g}, {event.samples} samples)"
    return f"The signal '{event.signal}' has drifted{figures}."


def _wrong_state(proposal: Proposal, verb: str) -> ConflictError:
    return ConflictError(
        f"Retraining '{proposal.id}' is {proposal.state} and cannot be {verb}.",
        param="retraining_id",
        code="invalid_retraining_state",
    )


def _changed(proposal: Proposal) -> ConflictError:
    return ConflictError(
        f"Retraining '{proposal.id}' has just changed: look at it again.",
        param="retraining_id",
        code="retraining_changed",
    )
