"""/v1/drift: whether the traffic of a tenant's adapters still is what they were made for, and what was said to it."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from service.api.auth import KeyIdDep, TenantDep
from service.api.json_body import JsonRoute
from service.api.pages import After, Limit, list_body, only_query
from service.api.services import Services, ServicesDep
from service.api.wire import WireModel
from service.drift import DriftWatch
from service.drift_states import SignalState
from service.drift_view import Acknowledgement, StreamView
from service.errors import ConflictError, InvalidRequestError

router = APIRouter(route_class=JsonRoute, prefix="/v1", tags=["drift"])

Signal = Literal[
    "prompt_embedding",
    "prompt_length",
    "prompt_nll",
    "answer_nll",
    "answer_entropy",
    "answer_length",
    "finish_length",
    "valid_json",
    "refusal",
]


class AcknowledgeRequest(WireModel):
    """Without `signal`, all that are in drift."""

    signal: Signal | None = None
    note: str | None = Field(None, min_length=1, max_length=1000)


@router.get("/drift", dependencies=[Depends(only_query("after", "limit"))])
def list_drift(tenant: TenantDep, services: ServicesDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Of each adapter that was asked; those whose traffic began last come first."""
    page = _watch(services).records.list(tenant.id, after=after, limit=limit)
    return list_body([drift_body(view) for view in page.items], has_more=page.has_more)


@router.get("/drift/{model:path}", dependencies=[Depends(only_query())])
def get_drift(model: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """By version id, checkpoint id or alias (what it points at)."""
    watch, (name, digest) = _watch(services), _adapter(services, tenant.id, model)
    return drift_body(watch.records.get(tenant.id, digest, name))


@router.post("/drift/{model:path}/acknowledge")
def acknowledge_drift(
    model: str, body: AcknowledgeRequest, tenant: TenantDep, key_id: KeyIdDep, services: ServicesDep
) -> dict[str, Any]:
    """The signals begin again; who said so stays on record."""
    watch, (name, digest) = _watch(services), _adapter(services, tenant.id, model)
    watch.acknowledge(tenant.id, digest, name, signal=body.signal, by=key_id, note=body.note)
    return drift_body(watch.records.get(tenant.id, digest, name))


@router.get("/drift_events", dependencies=[Depends(only_query("model", "after", "limit"))])
def list_drift_events(
    tenant: TenantDep, services: ServicesDep, model: str | None = None, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """Newest first; of one model, or of all."""
    watch = _watch(services)
    digest = None if model is None else _adapter(services, tenant.id, model)[1]
    page = watch.events.list(tenant.id, digest=digest, after=after, limit=limit)
    return list_body([event.body() for event in page.items], has_more=page.has_more)


def drift_body(view: StreamView) -> dict[str, Any]:
    """What is unknown is null, never 0."""
    return {
        "id": view.id,
        "object": "drift",
        "model": view.model,
        "digest": view.digest,
        "state": view.state.value,
        "reference": None if view.id is None else view.reference.value,
        "samples": view.samples,
        "signals": [_signal_body(signal, view.acknowledged.get(name)) for name, signal in view.signals.items()],
        "created_at": None if view.created_at is None else int(view.created_at),
        "last_seen_at": None if view.seen_at is None else int(view.seen_at),
    }


def _signal_body(signal: SignalState, given: Acknowledgement | None) -> dict[str, Any]:
    return {
        "signal": signal.signal,
        "state": signal.state.value,
        "since": int(signal.since) or None,
        "statistic": signal.statistic,
        "threshold": signal.threshold,
        "ratio": signal.ratio,
        "samples": signal.samples,
        "acknowledged": None if given is None else {"at": int(given.at), "by": given.by, "note": given.note},
    }


def _watch(services: Services) -> DriftWatch:
    if services.drift is None:
        raise ConflictError("The operator has turned the watch for drift off.", code="drift_off")
    return services.drift


def _adapter(services: Services, tenant_id: str, model: str) -> tuple[str, str]:
    """Its id and digest."""
    if model == services.registry.base.name:
        raise InvalidRequestError(
            "The base alone has no training prompts to compare with: ask for one of your fine-tuned models.",
            param="model",
            code="drift_not_watched",
        )
    version = services.registry.version(tenant_id, model)
    return version.id, version.digest
