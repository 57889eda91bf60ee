"""/v1/admin: tenants, their limits and keys, and who changed what; for the bearer of the admin key."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from service.api.auth import AdminDep
from service.api.json_body import JsonRoute
from service.api.keys import KeyRequest, RotateRequest, key_body
from service.api.pages import After, Limit, list_body, only_query
from service.api.services import ServicesDep
from service.api.wire import WireModel
from service.keys import Role
from service.quotas import TenantLimits
from service.tenants import Tenant

router = APIRouter(route_class=JsonRoute, prefix="/v1/admin", tags=["admin"])

Rate = Annotated[int | None, Field(ge=1, lt=2**53)]
Quota = Annotated[int | None, Field(ge=0, lt=2**53)]


class TenantRequest(WireModel):
    name: str = Field(min_length=1, max_length=64)


class LimitsRequest(WireModel):
    """`null`: no limit. What each means is told in `service.quotas`."""

    requests_per_minute: Rate = None
    tokens_per_minute: Rate = None
    max_files: Quota = None
    max_bytes: Quota = None
    max_jobs: Quota = None
    max_adapters: Quota = None


class TenantChange(WireModel):
    limits: LimitsRequest


@router.post("/tenants")
def create_tenant(body: TenantRequest, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    """The answer is the only place where the API key is ever shown."""
    tenant, api_key = services.tenants.create(body.name)
    return {**tenant_body(tenant), "api_key": api_key}


@router.get("/tenants", dependencies=[Depends(only_query())])
def list_tenants(_: AdminDep, services: ServicesDep) -> dict[str, Any]:
    return list_body([tenant_body(tenant) for tenant in services.tenants.list()])


@router.get("/tenants/{tenant_id}")
def get_tenant(tenant_id: str, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    tenant = services.tenants.get(tenant_id)
    return {**tenant_body(tenant), "limits": services.tenants.limits(tenant_id).as_dict()}


@router.put("/tenants/{tenant_id}")
def set_tenant(tenant_id: str, body: TenantChange, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    """All limits anew: one that is left out is none."""
    return _change(tenant_id, TenantLimits(**body.limits.model_dump()).as_dict(), services)


@router.patch("/tenants/{tenant_id}")
def change_tenant(tenant_id: str, body: TenantChange, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    """A limit that is left out stays as it is."""
    return _change(tenant_id, body.limits.model_dump(exclude_unset=True), services)


def _change(tenant_id: str, changes: dict[str, int | None], services: ServicesDep) -> dict[str, Any]:
    limits = services.tenants.change_limits(tenant_id, changes)
    return {**tenant_body(services.tenants.get(tenant_id)), "limits": limits.as_dict()}


@router.delete("/tenants/{tenant_id}")
def delete_tenant(tenant_id: str, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    """Its keys stop working at once, its answers and jobs end, and all that it had is gone. `erased` is false when a
    part of it outside the database could not be removed yet: that is tried again until it is."""
    erased = services.removal.remove(tenant_id)
    return {"id": tenant_id, "object": "tenant", "deleted": True, "erased": erased}


@router.get("/tenants/{tenant_id}/keys", dependencies=[Depends(only_query())])
def list_keys(tenant_id: str, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    return list_body([key_body(key) for key in services.tenants.keys(tenant_id)])


@router.post("/tenants/{tenant_id}/keys")
def rotate_key(tenant_id: str, _: AdminDep, services: ServicesDep, body: RotateRequest | None = None) -> dict[str, Any]:
    """A new API key; the older ones stop working, at once or after `overlap_seconds`."""
    overlap = 0.0 if body is None else float(body.overlap_seconds)
    api_key = services.tenants.rotate_key(tenant_id, overlap_seconds=overlap)
    return {**tenant_body(services.tenants.get(tenant_id)), "api_key": api_key}


@router.post("/tenants/{tenant_id}/keys/additional")
def add_key(tenant_id: str, body: KeyRequest, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    """A further key; the older ones go on working."""
    key, api_key = services.tenants.create_key(
        tenant_id, role=Role(body.role), name=body.name, expires_in_seconds=body.expires_in_seconds
    )
    return {**key_body(key), "api_key": api_key}


@router.delete("/tenants/{tenant_id}/keys/{key_id}")
def revoke_key(tenant_id: str, key_id: str, _: AdminDep, services: ServicesDep) -> dict[str, Any]:
    services.tenants.revoke_key(tenant_id, key_id)
    return {"id": key_id, "object": "api_key", "deleted": True}


@router.get("/audit", dependencies=[Depends(only_query("after", "limit", "tenant_id"))])
def list_audit(
    _: AdminDep,
    services: ServicesDep,
    after: After = None,
    limit: Limit = 20,
    tenant_id: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    page = services.audit.list(tenant_id=tenant_id, after=after, limit=limit)
    entries = [
        {
            "id": entry.id,
            "object": "audit.entry",
            "created_at": int(entry.at),
            "actor": entry.actor,
            "action": entry.action,
            "tenant_id": entry.tenant_id,
            "details": dict(entry.details),
        }
        for entry in page.items
    ]
    return list_body(entries, has_more=page.has_more)


def tenant_body(tenant: Tenant) -> dict[str, Any]:
    return {"id": tenant.id, "object": "tenant", "name": tenant.name, "created_at": int(tenant.created_at)}
