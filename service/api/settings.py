"""/v1/settings: what a tenant has chosen for itself."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from service.api.auth import TenantDep
from service.api.services import ServicesDep
from service.api.wire import WireModel
from service.tenant_settings import TenantChoices

router = APIRouter(prefix="/v1/settings", tags=["settings"])


class SettingsRequest(WireModel):
    capture: bool


@router.get("")
def get_settings(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return settings_body(services.rollout.settings.get(tenant.id))


@router.put("")
def set_settings(body: SettingsRequest, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """Turning `capture` off also erases the texts that were captured."""
    return settings_body(services.rollout.settings.set(tenant.id, TenantChoices(capture=body.capture)))


def settings_body(choices: TenantChoices) -> dict[str, Any]:
    return {"object": "settings", "capture": choices.capture}
