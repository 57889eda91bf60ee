"""/v1/files: upload, list, look, download, delete. Knows the wire; limits and durability are `service.files`'."""

from __future__ import annotations

import re
from asyncio import wrap_future
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import StringConstraints
from starlette.datastructures import FormData, UploadFile

from service.api.auth import TenantDep
from service.api.description import BINARY, answers, form_body
from service.api.json_body import JsonRoute
from service.api.pages import After, list_body, only_query
from service.api.services import ServicesDep
from service.api.wire import WireModel
from service.errors import InvalidRequestError, NotFoundError
from service.files import File, FilePurpose, Files, storage_unavailable

router = APIRouter(route_class=JsonRoute, tags=["files"])


class ReportRequest(WireModel):
    """The body of `POST /v1/files/{file_id}/report`; it may be left out."""

    validation_file: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None


UPLOADABLE = (FilePurpose.FINE_TUNE, FilePurpose.USER_DATA)
MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 30 * 24 * 3600
MAX_FILENAME_CHARACTERS = 255
_CHUNK_BYTES = 1024 * 1024
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"


FORM = form_body(
    ("file", "purpose"),
    {
        "file": BINARY,
        "purpose": {"type": "string", "enum": list(UPLOADABLE)},
        _ANCHOR: {"type": "string", "enum": ["created_at"]},
        _SECONDS: {"type": "integer", "minimum": MIN_EXPIRY_SECONDS, "maximum": MAX_EXPIRY_SECONDS},
    },
)


@router.post("/v1/files", openapi_extra=FORM)
async def upload_file(request: Request, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    # The form is read here and not by FastAPI, so that nothing is read for a caller without a key.
    try:
        async with request.form(max_files=1, max_fields=len(("purpose", _ANCHOR, _SECONDS)) + 1) as form:
            upload, purpose, expiry = _understand(form)
            chunks = iter(lambda: upload.file.read(_CHUNK_BYTES), b"")
            made = await run_in_threadpool(
                services.files.create,
                tenant.id,
                _filename(upload.filename),
                purpose,
                chunks,
                expires_after_seconds=expiry,
            )
    except OSError as error:  # while it comes in, a long one is kept in a temporary file
        raise storage_unavailable(error) from error
    return file_body(made)


@router.get("/v1/files", dependencies=[Depends(only_query("after", "limit", "order", "purpose"))])
def list_files(
    tenant: TenantDep,
    services: ServicesDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: FilePurpose | None = None,
) -> dict[str, Any]:
    page = services.files.list(tenant.id, purpose=purpose, after=after, limit=limit, newest_first=order == "desc")
    return list_body([file_body(file) for file in page.items], has_more=page.has_more)


@router.get("/v1/files/{file_id}")
def get_file(file_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return file_body(services.files.get(tenant.id, file_id))


@router.get(
    "/v1/files/{file_id}/content", response_class=StreamingResponse, responses=answers("application/octet-stream")
)
def get_file_content(file_id: str, tenant: TenantDep, services: ServicesDep) -> StreamingResponse:
    file = services.files.get(tenant.id, file_id)
    headers = {
        "content-length": str(file.bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
    }
    return StreamingResponse(_content(services.files, file), headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}")
def delete_file(file_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    services.files.delete(tenant.id, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.post("/v1/files/{file_id}/report")
async def report_on_file(
    file_id: str, tenant: TenantDep, services: ServicesDep, body: ReportRequest | None = None
) -> dict[str, Any]:
    other_id = None if body is None else body.validation_file
    training, validation = await run_in_threadpool(_report_files, services.files, tenant.id, file_id, other_id)
    made = await wrap_future(services.data_reports.submit(tenant.id, training, validation))
    return {
        "id": made.id,
        "object": "file.report",
        "created_at": int(made.created_at),
        "file_id": file_id,
        "validation_file": other_id,
        "model": services.base.name,
        **made.report.as_dict(),
    }


def _report_files(files: Files, tenant_id: str, file_id: str, other_id: str | None) -> tuple[File, File | None]:
    training = files.get(tenant_id, file_id)
    if other_id is None:
        return training, None
    try:
        return training, files.get(tenant_id, other_id)
    except NotFoundError as error:
        raise InvalidRequestError(error.message, param="validation_file", code="invalid_validation_file") from None


def file_body(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "expires_at": None if file.expires_at is None else int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _content(files: Files, file: File) -> Iterator[bytes]:
    with files.open(file.tenant_id, file.id) as stream:
        yield from iter(lambda: stream.read(_CHUNK_BYTES), b"")


def _understand(form: FormData) -> tuple[UploadFile, FilePurpose, int | None]:
    for name in form:
        if name not in ("file", "purpose", _ANCHOR, _SECONDS):
            raise InvalidRequestError(
                f"Unrecognized request argument supplied: '{name}'.", param=name, code="unknown_parameter"
            )
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise InvalidRequestError(
            "Send the file as multipart/form-data, in a part named 'file' with a file name.",
            param="file",
            code="missing_required_parameter",
        )
    return upload, _purpose(form), _expiry(form)


def _purpose(form: FormData) -> FilePurpose:
    purpose = form.get("purpose")
    if purpose is None:
        raise InvalidRequestError(
            "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter"
        )
    for known in UPLOADABLE:
        if purpose == known:
            return known
    names = " or ".join(f"'{known}'" for known in UPLOADABLE)
    raise InvalidRequestError(
        f"Files can be uploaded with purpose {names} only.", param="purpose", code="invalid_value"
    )


def _expiry(form: FormData) -> int | None:
    anchor, seconds = form.get(_ANCHOR), form.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequestError(f"'{_ANCHOR}' must be 'created_at'.", param=_ANCHOR, code="invalid_value")
    text = seconds if isinstance(seconds, str) and re.fullmatch("[0-9]{1,10}", seconds) else "0"
    if not MIN_EXPIRY_SECONDS <= int(text) <= MAX_EXPIRY_SECONDS:
        raise InvalidRequestError(
            f"'{_SECONDS}' must be between {MIN_EXPIRY_SECONDS} and {MAX_EXPIRY_SECONDS}.",
            param=_SECONDS,
            code="invalid_value",
        )
    return int(text)


def _filename(name: str | None) -> str:
    """The last part of the client's path, without what no file name may hold."""
    last = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    clean = "".join(character for character in last if character.isprintable())
    return clean[:MAX_FILENAME_CHARACTERS] or "file"
