"""/v1/captures: the prompts and answers that a tenant lets the service keep, shown and forgotten."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from service.api.auth import TenantDep
from service.api.json_body import JsonRoute
from service.api.pages import After, Limit, list_body, only_query
from service.api.services import ServicesDep
from service.captures import Capture

router = APIRouter(route_class=JsonRoute, prefix="/v1/captures", tags=["captures"])

User = Annotated[str | None, Query(min_length=1, max_length=256)]


@router.get("", dependencies=[Depends(only_query("after", "limit", "user"))])
def list_captures(
    tenant: TenantDep, services: ServicesDep, after: After = None, limit: Limit = 20, user: User = None
) -> dict[str, Any]:
    """Newest first; with `user`, of that end user alone."""
    page = services.rollout.captures.list(tenant.id, user=user, after=after, limit=limit)
    return list_body([capture_body(capture) for capture in page.items], has_more=page.has_more)


@router.delete("", dependencies=[Depends(only_query("user"))])
def delete_captures(tenant: TenantDep, services: ServicesDep, user: User = None) -> dict[str, Any]:
    """Also corrections, and whatever files and reports were made of them; with `user`, of that end user's."""
    services.rollout.traffic.flush()  # what is still on its way
    forgotten = services.rollout.settings.forget(tenant.id, user)
    services.files.remove_expired()
    services.retraining.wake()
    return {
        "object": "captures.deleted",
        "deleted": True,
        "num_captures": forgotten.captures,
        "num_corrections": forgotten.corrections,
    }


def capture_body(capture: Capture) -> dict[str, Any]:
    """`id` is the completion's; `messages` of a chat, or `prompt` of the legacy endpoint."""
    return {
        "id": capture.id,
        "object": "capture",
        "model": capture.model,
        **capture.prompt,
        "answer": capture.answer,
        "bytes": capture.bytes,
        "created_at": int(capture.created_at),
        "expires_at": int(capture.expires_at),
    }
