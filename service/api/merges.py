"""Merged models: ask for one, look, download, delete. Knows the wire; `service.merges` keeps them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse

from adapters.peft_archive import zip_chunks
from service.api.auth import TenantDep
from service.api.description import answers
from service.api.json_body import JsonRoute
from service.api.pages import list_body, only_query
from service.api.services import Services, ServicesDep
from service.errors import ConflictError, InvalidRequestError, NotFoundError
from service.merges import Merge, Merges, MergeState, merged_bytes

router = APIRouter(route_class=JsonRoute, tags=["merges"])


@router.post("/v1/adapters/{model:path}/merge")
def create_merge(model: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """Queue it; the same adapter again answers the merge that is there."""
    merges = _merges(services)
    version = services.registry.version(tenant.id, model)
    services.registry.resolve(tenant.id, version.id)  # refuses an adapter of another base
    return merge_body(merges.create(tenant.id, version, merged_bytes(services.base)))


@router.get("/v1/merges", dependencies=[Depends(only_query())])
def list_merges(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return list_body([merge_body(merge) for merge in _merges(services).list(tenant.id)])


@router.get("/v1/merges/{merge_id}")
def get_merge(merge_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return merge_body(_merges(services).get(tenant.id, merge_id))


@router.get("/v1/merges/{merge_id}/content", response_class=StreamingResponse, responses=answers("application/zip"))
def get_merge_content(merge_id: str, tenant: TenantDep, services: ServicesDep) -> StreamingResponse:
    """A zip of the model's directory."""
    merges = _merges(services)
    merge = merges.get(tenant.id, merge_id)
    if merge.state is not MergeState.SUCCEEDED:
        raise ConflictError(f"The merge '{merge_id}' is {merge.state}.", param="merge_id", code="merge_not_ready")
    directory = merges.directory(merge)
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(directory.glob("*"))}
    chunks = zip_chunks(files)
    try:
        next(chunks)  # the files are open now: expiry cuts no download
    except FileNotFoundError:
        files = {}
    if not files:
        raise NotFoundError(f"The files of '{merge_id}' are not on this machine.", param="merge_id")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{merge.model}-merged.zip")
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
    return StreamingResponse(chunks, headers=headers, media_type="application/zip")


@router.delete("/v1/merges/{merge_id}")
def delete_merge(merge_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    _merges(services).delete(tenant.id, merge_id)
    return {"id": merge_id, "object": "adapter.merge", "deleted": True}


def merge_body(merge: Merge) -> dict[str, Any]:
    return {
        "id": merge.id,
        "object": "adapter.merge",
        "model": merge.model,
        "digest": merge.digest,
        "status": merge.state,
        "bytes": merge.bytes if merge.state is MergeState.SUCCEEDED else None,
        "report": merge.report,
        "error": merge.error,
        "created_at": int(merge.created_at),
        "finished_at": None if merge.finished_at is None else int(merge.finished_at),
        "expires_at": None if merge.expires_at is None else int(merge.expires_at),
    }


def _merges(services: Services) -> Merges:
    if services.merges is None:
        raise InvalidRequestError("Merging is turned off on this service.", code="merging_off")
    return services.merges
