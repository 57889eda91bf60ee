"""/v1/settings: what a tenant has chosen for itself."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from service.api.auth import TenantDep
from service.api.json_body import JsonRoute
from service.api.services import ServicesDep
from service.api.wire import WireModel
from service.tenant_settings import MAX_CAPTURE_DAYS, RetrainingPolicy, TenantChoices

router = APIRouter(route_class=JsonRoute, prefix="/v1/settings", tags=["settings"])


class SettingsRequest(WireModel):
    """What is left out stays as it is."""

    capture: bool | None = None
    capture_days: int | None = Field(None, ge=1, le=MAX_CAPTURE_DAYS)
    retraining: Literal["off", "propose", "auto"] | None = None


@router.get("")
def get_settings(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return settings_body(services.rollout.settings.get(tenant.id))


@router.put("")
def set_settings(body: SettingsRequest, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """Turning `capture` off also erases the texts that were captured."""
    policy = None if body.retraining is None else RetrainingPolicy(body.retraining)
    changed = services.rollout.settings.change(
        tenant.id, capture=body.capture, capture_days=body.capture_days, retraining=policy
    )
    services.files.remove_expired()
    services.retraining.wake()
    return settings_body(changed)


def settings_body(choices: TenantChoices) -> dict[str, Any]:
    return {
        "object": "settings",
        "capture": choices.capture,
        "capture_days": choices.capture_days,
        "retraining": choices.retraining,
    }
