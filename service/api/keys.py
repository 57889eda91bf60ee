"""/v1/keys: a tenant's own API keys; with a key of the role `admin`. Knows the wire only."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from service.api.auth import AccessDep, TenantDep
from service.api.json_body import JsonRoute
from service.api.pages import list_body, only_query
from service.api.services import ServicesDep
from service.api.wire import WireModel
from service.keys import Key, Role

router = APIRouter(route_class=JsonRoute, prefix="/v1/keys", tags=["keys"])

MAX_LIFETIME_SECONDS = 10 * 365 * 24 * 3600
MAX_OVERLAP_SECONDS = 30 * 24 * 3600


class KeyRequest(WireModel):
    role: Literal["admin", "inference"] = "inference"
    name: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")
    expires_in_seconds: int | None = Field(None, ge=1, le=MAX_LIFETIME_SECONDS)


class RotateRequest(WireModel):
    """For how long what is replaced goes on working."""

    overlap_seconds: int = Field(0, ge=0, le=MAX_OVERLAP_SECONDS)


@router.get("", dependencies=[Depends(only_query())])
def list_keys(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return list_body([key_body(key) for key in services.tenants.keys(tenant.id)])


@router.post("")
def create_key(body: KeyRequest, access: AccessDep, services: ServicesDep) -> dict[str, Any]:
    """The answer is the only place where the key is ever shown."""
    key, api_key = services.tenants.create_key(
        access.tenant.id,
        role=Role(body.role),
        name=body.name,
        expires_in_seconds=body.expires_in_seconds,
        actor=f"key:{access.key_id}",
    )
    return {**key_body(key), "api_key": api_key}


@router.post("/{key_id}/rotate")
def rotate_key(
    key_id: str, access: AccessDep, services: ServicesDep, body: RotateRequest | None = None
) -> dict[str, Any]:
    """A new key of the same role, name and lifetime; the old one stops working, at once or after `overlap_seconds`."""
    overlap = 0.0 if body is None else float(body.overlap_seconds)
    key, api_key = services.tenants.replace_key(
        access.tenant.id, key_id, overlap_seconds=overlap, actor=f"key:{access.key_id}"
    )
    return {**key_body(key), "api_key": api_key}


@router.delete("/{key_id}")
def revoke_key(key_id: str, access: AccessDep, services: ServicesDep) -> dict[str, Any]:
    services.tenants.revoke_key(access.tenant.id, key_id, actor=f"key:{access.key_id}")
    return {"id": key_id, "object": "api_key", "deleted": True}


def key_body(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "role": key.role,
        "created_at": int(key.created_at),
        "expires_at": None if key.expires_at is None else int(key.expires_at),
    }
