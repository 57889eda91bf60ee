"""/v1/adapters: what lies behind the tenant's model ids: content digests, jobs, metrics, aliases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends

from service.aliases import Alias
from service.api.auth import TenantDep
from service.api.pages import list_body, only_query
from service.api.services import ServicesDep
from service.versions import AdapterVersion

router = APIRouter(tags=["adapters"])


@router.get("/v1/adapters", dependencies=[Depends(only_query())])
def list_adapters(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    aliases = services.registry.aliases.list(tenant.id)
    return list_body([adapter_body(version, aliases) for version in services.registry.versions(tenant.id)])


@router.get("/v1/adapters/{model:path}")
def get_adapter(model: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """By version id, checkpoint id or alias."""
    version = services.registry.version(tenant.id, model)
    return adapter_body(version, services.registry.aliases.list(tenant.id))


def adapter_body(version: AdapterVersion, aliases: Sequence[Alias]) -> dict[str, Any]:
    return {
        "id": version.id,
        "object": "adapter",
        "digest": version.digest,
        "job": version.job_id,
        "step": version.step,
        "base_model": version.base_model,
        "base_fingerprint": version.base_fingerprint,
        "metrics": dict(version.metrics),
        "created_at": int(version.created_at),
        "aliases": [alias.name for alias in aliases if alias.model == version.id],
    }
