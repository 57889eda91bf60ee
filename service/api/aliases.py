"""/v1/aliases: a tenant's stable names for its models, with history, promotion and rollback."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import Field

from service.aliases import Alias
from service.api.auth import TenantDep
from service.api.json_body import JsonRoute
from service.api.pages import list_body, only_query
from service.api.services import ServicesDep
from service.api.wire import WireModel
from service.registry import Registry

router = APIRouter(route_class=JsonRoute, prefix="/v1/aliases", tags=["aliases"])


class AliasRequest(WireModel):
    model: str = Field(min_length=1, max_length=512)


class PromoteRequest(WireModel):
    model: str | None = Field(None, min_length=1, max_length=512)


@router.get("", dependencies=[Depends(only_query())])
def list_aliases(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return list_body([alias_body(alias, services.registry) for alias in services.registry.aliases.list(tenant.id)])


@router.put("/{alias}")
def set_alias(alias: str, body: AliasRequest, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return alias_body(services.registry.aliases.set(tenant.id, alias, body.model), services.registry)


@router.get("/{alias}")
def get_alias(alias: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return alias_body(services.registry.aliases.get(tenant.id, alias), services.registry)


@router.delete("/{alias}")
def delete_alias(alias: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    services.registry.aliases.delete(tenant.id, alias)
    return {"id": alias, "object": "alias", "deleted": True}


@router.post("/{alias}/promote")
def promote(alias: str, tenant: TenantDep, services: ServicesDep, body: PromoteRequest | None = None) -> dict[str, Any]:
    """Of the canary that runs, or of the `model` that the body names."""
    model = None if body is None else body.model
    return alias_body(services.rollout.canaries.promote(tenant.id, alias, model), services.registry)


@router.post("/{alias}/rollback")
def roll_back_alias(alias: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return alias_body(services.registry.aliases.roll_back(tenant.id, alias), services.registry)


def alias_body(alias: Alias, registry: Registry) -> dict[str, Any]:
    return {
        "id": alias.name,
        "object": "alias",
        "model": alias.model,
        "digest": alias.digest,
        "stale": not registry.serves(alias),
        "updated_at": int(alias.updated_at),
        "history": [
            {"model": move.model, "kind": move.kind, "created_at": int(move.created_at)} for move in alias.history
        ],
    }
