"""/v1/admin/tenants, for the bearer of the admin key: make, list, remove tenants, rotate their keys."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import Field

from service.api.auth import AdminDep
from service.api.json_body import JsonRoute
from service.api.models import retire
from service.api.pages import list_body, only_query
from service.api.services import ServicesDep
from service.api.wire import WireModel
from service.tenants import Tenant

router = APIRouter(route_class=JsonRoute, prefix="/v1/admin/tenants", tags=["admin"])


class TenantRequest(WireModel):
    name: str = Field(min_length=1, max_length=64)


@router.post("")
def create_tenant(body: TenantRequest, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    """The answer is the only place where the API key is ever shown."""
    tenant, api_key = services.tenants.create(body.name)
    return {**tenant_body(tenant), "api_key": api_key}


@router.get("", dependencies=[Depends(only_query())])
def list_tenants(_: AdminDep, services: ServicesDep) -> dict[str, Any]:
    return list_body([tenant_body(tenant) for tenant in services.tenants.list()])


@router.get("/{tenant_id}")
def get_tenant(tenant_id: str, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    return tenant_body(services.tenants.get(tenant_id))


@router.delete("/{tenant_id}")
def delete_tenant(tenant_id: str, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    """Its keys stop working at once; files, jobs, models and aliases are gone with it."""
    removed = services.tenants.delete(tenant_id)
    services.files.discard(removed.storage_keys)
    for digest in removed.digests:
        retire(services, digest)
    if services.drift is not None:
        services.drift.forget_deleted(tenant_id)
    services.metrics.forget_tenant(tenant_id)
    return {"id": tenant_id, "object": "tenant", "deleted": True}


@router.post("/{tenant_id}/keys")
def rotate_key(tenant_id: str, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    """A new API key; the older ones stop working."""
    tenant = services.tenants.get(tenant_id)
    return {**tenant_body(tenant), "api_key": services.tenants.rotate_key(tenant_id)}


def tenant_body(tenant: Tenant) -> dict[str, Any]:
    return {"id": tenant.id, "object": "tenant", "name": tenant.name, "created_at": int(tenant.created_at)}
