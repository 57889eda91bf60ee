"""/v1/aliases/{alias}/canary, /shadow and /experiments: versions tried out beside the one the alias points at."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import Field

from service.api.auth import TenantDep
from service.api.experiment_body import experiment_body
from service.api.json_body import JsonRoute
from service.api.pages import After, Limit, list_body, only_query
from service.api.services import Services, ServicesDep
from service.api.wire import WireModel
from service.experiment import CanaryPolicy, Experiment, ExperimentKind

router = APIRouter(route_class=JsonRoute, prefix="/v1/aliases/{alias}", tags=["aliases"])

CANARY, SHADOW = ExperimentKind.CANARY, ExperimentKind.SHADOW
Share = Field(None, ge=0, lt=1)


class CanaryRequest(WireModel):
    """What is left out has the default of `service.experiment.CanaryPolicy`."""

    model: str = Field(min_length=1, max_length=512)
    percent: float = Field(gt=0, le=99)
    min_samples: int | None = Field(None, ge=1, le=1_000_000)
    alpha: float | None = Field(None, ge=0.0001, le=0.2)
    max_error_increase: float | None = Share
    max_down_increase: float | None = Share
    auto_promote: bool | None = None
    promote_margin: float | None = Field(None, gt=0, lt=1)

    @property
    def policy(self) -> CanaryPolicy:
        given = {field.name: getattr(self, field.name) for field in fields(CanaryPolicy)}
        return CanaryPolicy(**{name: value for name, value in given.items() if value is not None})


class ShadowRequest(WireModel):
    model: str = Field(min_length=1, max_length=512)
    percent: float = Field(gt=0, le=100)


@router.put("/canary")
def set_canary(alias: str, body: CanaryRequest, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    canaries = services.rollout.canaries
    return _body(services, canaries.set_canary(tenant.id, alias, body.model, body.percent, body.policy))


@router.get("/canary")
def get_canary(alias: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """The comparison so far."""
    return _body(services, services.rollout.canaries.running(tenant.id, alias, CANARY))


@router.delete("/canary")
def end_canary(alias: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """All traffic goes to the stable version again. Answers what the canary had shown."""
    return _body(services, services.rollout.canaries.abort(tenant.id, alias, CANARY))


@router.put("/shadow")
def set_shadow(alias: str, body: ShadowRequest, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return _body(services, services.rollout.canaries.set_shadow(tenant.id, alias, body.model, body.percent))


@router.get("/shadow")
def get_shadow(alias: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return _body(services, services.rollout.canaries.running(tenant.id, alias, SHADOW))


@router.delete("/shadow")
def end_shadow(alias: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return _body(services, services.rollout.canaries.abort(tenant.id, alias, SHADOW))


@router.get("/experiments", dependencies=[Depends(only_query("after", "limit"))])
def list_experiments(
    alias: str, tenant: TenantDep, services: ServicesDep, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """Canaries and shadows of the alias, newest first; ended ones are kept."""
    page = services.rollout.canaries.list(tenant.id, alias, after=after, limit=limit)
    return list_body([_body(services, experiment) for experiment in page.items], has_more=page.has_more)


def _body(services: Services, experiment: Experiment) -> dict[str, Any]:
    return experiment_body(experiment, services.rollout.canaries.measured(experiment))
