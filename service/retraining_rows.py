"""Proposals to retrain as rows, in the caller's transaction. Decides nothing; knows no texts and no jobs.

    collecting ──▶ checking ──▶ proposed ──▶ started        open: the first three and `insufficient`
        ▲  └─▶ insufficient       │  └─▶ dismissed          at most one open proposal for each target
        └────────┴────────────────┘                         failed: could not be made

Every change is fenced by `revision`: whoever worked on an older one loses, and nothing of it is seen.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import new_id
from service.errors import NotFoundError
from service.tables import epoch_now, files, retraining_events, retraining_proposals

MAX_SEED = 2**31 - 1
MAX_EVENTS = 100


class ProposalState(StrEnum):
    """INSUFFICIENT waits for more corrections. STARTED has a job; what came of it, the job says."""

    COLLECTING = "collecting"
    INSUFFICIENT = "insufficient"
    CHECKING = "checking"
    PROPOSED = "proposed"
    STARTED = "started"
    DISMISSED = "dismissed"
    FAILED = "failed"

    @property
    def is_open(self) -> bool:
        return self in OPEN


OPEN = (ProposalState.COLLECTING, ProposalState.INSUFFICIENT, ProposalState.CHECKING, ProposalState.PROPOSED)


class Trigger(StrEnum):
    DRIFT = "drift"
    QUALITY = "quality"
    REQUEST = "request"


@dataclass(frozen=True)
class RetrainingOptions:
    """`min_rating`: uncorrected answers rated so or better are learned as they are; None: none are."""

    include_original: bool = True
    min_rating: float | None = 0.5
    suffix: str | None = None


@dataclass(frozen=True)
class Proposal:
    """One row; see `service.tables`. Times are unix seconds by the database's clock."""

    id: str
    tenant_id: str
    target: str
    model: str
    digest: str | None
    alias: str | None
    trigger: Trigger
    reason: str
    options: RetrainingOptions
    state: ProposalState
    revision: int
    attempts: int
    seed: int
    missing: str | None
    counts: Mapping[str, int] | None
    training_file: str | None
    validation_file: str | None
    original_job: str | None
    report: Mapping[str, Any] | None
    estimate: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    job_id: str | None
    created_at: float
    collected_at: float | None
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True)
class ProposalEvent:
    created_at: float
    message: str


def insert_proposal(
    connection: Connection,
    tenant_id: str,
    *,
    model: str,
    digest: str | None,
    alias: str | None,
    trigger: Trigger,
    reason: str,
    options: RetrainingOptions,
) -> str:
    """Its id. The caller holds `lock_tenant` and has looked for an open one."""
    proposal_id = new_id("retrain")
    connection.execute(
        retraining_proposals.insert().values(
            id=proposal_id,
            tenant_id=tenant_id,
            target=alias or model,
            model=model,
            digest=digest,
            alias=alias,
            trigger=trigger,
            reason=reason,
            options=asdict(options),
            state=ProposalState.COLLECTING,
            seed=secrets.randbelow(MAX_SEED + 1),
            created_at=epoch_now(),
        )
    )
    add_event(connection, proposal_id, reason)
    return proposal_id


def move(connection: Connection, proposal: Proposal, state: ProposalState, **values: Any) -> bool:
    """False when somebody else was quicker: then nothing is written."""
    c = retraining_proposals.c
    fence = sa.and_(c.id == proposal.id, c.revision == proposal.revision, c.state == proposal.state)
    changed = {"state": state, "revision": proposal.revision + 1, **values}
    return connection.execute(retraining_proposals.update().where(fence).values(**changed)).rowcount == 1


def collect_again(connection: Connection, proposal_id: str, reason: str) -> bool:
    """An open proposal loses its files, and its data are put together anew. False: it is not open."""
    c = retraining_proposals.c
    nothing = {name: None for name in ("missing", "counts", "training_file", "validation_file", "report", "estimate")}
    row = connection.execute(sa.select(c.training_file, c.validation_file).where(c.id == proposal_id)).one()
    again = {**nothing, "texts_until": None, "attempts": 0, "state": ProposalState.COLLECTING}
    update = retraining_proposals.update().where(c.id == proposal_id, c.state.in_(OPEN))
    if connection.execute(update.values(**again, revision=c.revision + 1)).rowcount == 0:
        return False
    expire_files(connection, row.training_file, row.validation_file)
    add_event(connection, proposal_id, f"Collected again: {reason}")
    return True


def expire_files(connection: Connection, *file_ids: str | None) -> None:
    """What was made for a proposal; a job that uses it keeps it until it is done."""
    made = [file_id for file_id in file_ids if file_id is not None]
    connection.execute(files.update().where(files.c.id.in_(made)).values(expires_at=epoch_now()))


def add_event(connection: Connection, proposal_id: str, message: str) -> None:
    """Said once when it is said again at once: triggers repeat themselves."""
    e = retraining_events
    last = sa.select(e.c.message).where(e.c.proposal_id == proposal_id).order_by(e.c.seq.desc()).limit(1)
    if connection.execute(last).scalar() == message:
        return
    connection.execute(e.insert().values(proposal_id=proposal_id, created_at=epoch_now(), message=message))


def events_of(connection: Connection, proposal_id: str) -> tuple[ProposalEvent, ...]:
    """Newest first."""
    e = retraining_events.c
    query = sa.select(e.created_at, e.message).where(e.proposal_id == proposal_id).order_by(e.seq.desc())
    return tuple(ProposalEvent(*row) for row in connection.execute(query.limit(MAX_EVENTS)))


def get_proposal(connection: Connection, tenant_id: str, proposal_id: str) -> Proposal:
    mine = sa.and_(retraining_proposals.c.tenant_id == tenant_id, retraining_proposals.c.id == proposal_id)
    row = connection.execute(sa.select(retraining_proposals).where(mine)).one_or_none()
    if row is None:
        raise NotFoundError(
            f"There is no retraining '{proposal_id}'.", param="retraining_id", code="retraining_not_found"
        )
    return proposal_of(row)


def open_proposal(connection: Connection, tenant_id: str, target: str) -> Proposal | None:
    c = retraining_proposals.c
    mine = sa.and_(c.tenant_id == tenant_id, c.target == target, c.state.in_(OPEN))
    row = connection.execute(sa.select(retraining_proposals).where(mine)).one_or_none()
    return None if row is None else proposal_of(row)


def proposals_in(connection: Connection, *states: ProposalState) -> list[Proposal]:
    """Of all tenants, the oldest first."""
    c = retraining_proposals.c
    query = sa.select(retraining_proposals).where(c.state.in_(states)).order_by(c.seq)
    return [proposal_of(row) for row in connection.execute(query)]


def proposal_of(row: sa.Row[Any]) -> Proposal:
    values = {name: getattr(row, name) for name in Proposal.__dataclass_fields__}
    return Proposal(
        **{
            **values,
            "trigger": Trigger(row.trigger),
            "state": ProposalState(row.state),
            "options": RetrainingOptions(**row.options),
        }
    )
