"""/v1/models: the base and the tenant's fine-tuned models. A model id may hold '/', so it is a path."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from service.api.auth import TenantDep
from service.api.json_body import JsonRoute
from service.api.pages import only_query
from service.api.services import Services, ServicesDep
from service.registry import BaseIdentity, Registry
from service.versions import AdapterVersion

router = APIRouter(route_class=JsonRoute, tags=["models"])


@router.get("/v1/models", dependencies=[Depends(only_query())])
def list_models(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    versions = services.registry.versions(tenant.id)
    data = [
        base_body(services.registry.base),
        *(model_body(version, tenant.name, services.registry) for version in versions),
    ]
    return {"object": "list", "data": data}


@router.get("/v1/models/{model:path}")
def get_model(model: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    if model == services.registry.base.name:
        return base_body(services.registry.base)
    return model_body(services.registry.version(tenant.id, model), tenant.name, services.registry)


@router.delete("/v1/models/{model:path}")
def delete_model(model: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    digest = services.registry.delete_model(tenant.id, model)
    if services.drift is not None:
        services.drift.forget_deleted(tenant.id)
    if digest is not None:
        retire(services, digest)
    return {"id": model, "object": "model", "deleted": True}


def retire(services: Services, digest: str) -> None:
    """Nobody refers to this adapter any more: running answers finish, nothing new starts, its files go."""
    services.engine.retire(digest)
    services.registry.discard(services.store, digest)


def base_body(base: BaseIdentity) -> dict[str, Any]:
    return {"id": base.name, "object": "model", "created": int(base.created_at), "owned_by": "rootstock"}


def model_body(version: AdapterVersion, owner: str, registry: Registry) -> dict[str, Any]:
    """`stale`: it belongs to another base than the loaded one, and requests for it are refused."""
    body = {"id": version.id, "object": "model", "created": int(version.created_at), "owned_by": owner}
    return {**body, "stale": not registry.serves(version)}
