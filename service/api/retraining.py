"""/v1/retraining: proposals to train a model again on corrected answers, and what became of them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field, StringConstraints

from service.api.auth import TenantDep
from service.api.json_body import JsonRoute
from service.api.pages import After, Limit, list_body, only_query
from service.api.services import Services, ServicesDep
from service.api.wire import WireModel
from service.retraining import Outcome
from service.retraining_rows import Proposal, RetrainingOptions

router = APIRouter(route_class=JsonRoute, prefix="/v1/retraining", tags=["retraining"])


class RetrainingRequest(WireModel):
    """`min_rating`: answers rated so or better are learned as they are; null: only corrected ones are learned."""

    model: str = Field(min_length=1, max_length=512)
    include_original: bool = True
    min_rating: float | None = Field(0.5, ge=-1, le=1)
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}\z")] | None = None


@router.post("")
def create_retraining(body: RetrainingRequest, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """The proposal for this model or alias: the open one, or a new one. Its data are collected in the background."""
    options = RetrainingOptions(body.include_original, body.min_rating, body.suffix)
    return _detailed(services, services.retraining.request(tenant.id, body.model, options))


@router.get("", dependencies=[Depends(only_query("after", "limit"))])
def list_retraining(tenant: TenantDep, services: ServicesDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first, without reports and events."""
    page = services.retraining.list(tenant.id, after=after, limit=limit)
    data = [retraining_body(proposal, services.retraining.outcome(proposal)) for proposal in page.items]
    return list_body(data, has_more=page.has_more)


@router.get("/{retraining_id}", dependencies=[Depends(only_query())])
def get_retraining(retraining_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return _detailed(services, services.retraining.get(tenant.id, retraining_id))


@router.post("/{retraining_id}/approve")
def approve_retraining(retraining_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """Creates its fine-tuning job."""
    return _detailed(services, services.retraining.approve(tenant.id, retraining_id))


@router.post("/{retraining_id}/dismiss")
def dismiss_retraining(retraining_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    dismissed = services.retraining.dismiss(tenant.id, retraining_id)
    services.files.remove_expired()
    return _detailed(services, dismissed)


def retraining_body(proposal: Proposal, outcome: Outcome | None) -> dict[str, Any]:
    return {
        "id": proposal.id,
        "object": "retraining",
        "created_at": int(proposal.created_at),
        "status": proposal.state,
        "model": proposal.model,
        "digest": proposal.digest,
        "alias": proposal.alias,
        "trigger": proposal.trigger,
        "reason": proposal.reason,
        "include_original": proposal.options.include_original,
        "min_rating": proposal.options.min_rating,
        "suffix": proposal.options.suffix,
        "missing": proposal.missing,
        "counts": _counts(proposal),
        "training_file": proposal.training_file,
        "validation_file": proposal.validation_file,
        "estimate": None if proposal.estimate is None else dict(proposal.estimate),
        "error": None if proposal.error is None else dict(proposal.error),
        "started_at": _seconds(proposal.started_at),
        "ended_at": _seconds(proposal.ended_at),
        "job": proposal.job_id,
        "outcome": None if outcome is None else _outcome(outcome),
    }


def _detailed(services: Services, proposal: Proposal) -> dict[str, Any]:
    events = services.retraining.events(proposal)
    return {
        **retraining_body(proposal, services.retraining.outcome(proposal)),
        "report": None if proposal.report is None else dict(proposal.report),
        "events": [{"created_at": int(event.created_at), "message": event.message} for event in events],
    }


def _counts(proposal: Proposal) -> dict[str, int] | None:
    if proposal.counts is None:
        return None
    return {name: count for name, count in proposal.counts.items() if name != "seen"}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    """`alias_moved` false: the gate held the new model back; `reasons` say why."""
    return {
        "status": outcome.job.status,
        "fine_tuned_model": outcome.job.fine_tuned_model,
        "alias_moved": outcome.alias_moved,
        "reasons": list(outcome.reasons),
    }


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
