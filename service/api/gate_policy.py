"""/v1/gate_policy: what a tenant's candidates must show before they answer under an alias."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from adapters.gate import GatePolicy
from service.api.auth import TenantDep
from service.api.evaluation_schemas import GateRequest
from service.api.json_body import JsonRoute
from service.api.pages import only_query
from service.api.services import ServicesDep

router = APIRouter(route_class=JsonRoute, prefix="/v1/gate_policy", tags=["gate"])


@router.get("", dependencies=[Depends(only_query())])
def get_gate_policy(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return policy_body(services.jobs.gate_policies.get(tenant.id))


@router.put("")
def set_gate_policy(body: GateRequest, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """The whole policy: what is left out becomes the default again."""
    policy = body.applied_to(GatePolicy())
    services.jobs.gate_policies.set(tenant.id, policy)
    return policy_body(policy)


def policy_body(policy: GatePolicy) -> dict[str, Any]:
    return {"object": "gate_policy", **policy.as_dict()}
