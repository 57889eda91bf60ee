"""/v1/adapters: what lies behind the tenant's model ids: digests, metrics, cards; in and out as PEFT directories."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.datastructures import FormData, UploadFile

from adapters.adapter_files import AdapterFiles
from adapters.errors import AdapterDamagedError, AdapterNotFoundError
from adapters.gguf_lora import write_gguf
from adapters.manifest import REQUIRED_FILES
from adapters.peft_archive import README_NAME, zip_chunks
from adapters.peft_format import read_adapter
from service.adapter_import import AdapterImport
from service.aliases import Alias
from service.api.auth import TenantDep
from service.api.description import BINARY, answers, form_body
from service.api.json_body import JsonRoute
from service.api.pages import list_body, only_query
from service.api.services import Services, ServicesDep
from service.card import make_card
from service.card_markdown import card_markdown
from service.errors import InvalidRequestError, TooLargeError
from service.registry import Registry
from service.versions import AdapterVersion

router = APIRouter(route_class=JsonRoute, tags=["adapters"])

_FIELDS = ("file", "suffix", "alias")
_CHUNK_BYTES = 1024 * 1024

FORM = form_body(("file", "suffix"), {"file": BINARY, "suffix": {"type": "string"}, "alias": {"type": "string"}})


@router.get("/v1/adapters", dependencies=[Depends(only_query())])
def list_adapters(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    aliases = services.registry.aliases.list(tenant.id)
    return list_body(
        [adapter_body(version, aliases, services.registry) for version in services.registry.versions(tenant.id)]
    )


@router.post("/v1/adapters", openapi_extra=FORM)
async def import_adapter(request: Request, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """A zip of a PEFT directory, as multipart/form-data: `file`, `suffix`, and `alias` where one shall move to it."""
    importer = AdapterImport(services.registry, services.store, services.base, max_rank=services.settings.max_lora_rank)
    async with request.form(max_files=1, max_fields=len(_FIELDS)) as form:
        upload, suffix, alias = _understand(form)
        if upload.size is None or upload.size > importer.max_bytes:
            raise TooLargeError(
                f"The archive is longer than any adapter of this base ({importer.max_bytes} bytes).", param="file"
            )
        version = await run_in_threadpool(
            importer.from_zip,
            tenant,
            upload.file,
            filename=_printable(upload.filename or "adapter.zip"),
            suffix=suffix,
            alias=alias,
        )
    aliases = await run_in_threadpool(services.registry.aliases.list, tenant.id)
    return adapter_body(version, aliases, services.registry)


@router.get(
    "/v1/adapters/{model:path}/card",
    dependencies=[Depends(only_query("format"))],
    responses=answers("application/json", "text/markdown"),
)
def get_card(
    model: str,
    request: Request,
    tenant: TenantDep,
    services: ServicesDep,
    format: Annotated[Literal["json", "markdown"] | None, Query()] = None,
) -> Response:
    """JSON, or Markdown for `Accept: text/markdown`; `format` wins."""
    card = _card(services, services.registry.version(tenant.id, model), request)
    if format == "markdown" or (format is None and "text/markdown" in request.headers.get("accept", "")):
        return PlainTextResponse(card_markdown(card), media_type="text/markdown")
    return JSONResponse(card)


@router.get(
    "/v1/adapters/{model:path}/export",
    dependencies=[Depends(only_query("format"))],
    response_class=StreamingResponse,
    responses=answers("application/octet-stream"),
)
def export_adapter(
    model: str,
    request: Request,
    tenant: TenantDep,
    services: ServicesDep,
    format: Annotated[Literal["zip", "gguf"], Query()] = "zip",
) -> StreamingResponse:
    """The PEFT directory, with the card as its README; or a GGUF for llama.cpp."""
    version = services.registry.version(tenant.id, model)
    files = services.store.read(version.digest, REQUIRED_FILES)
    if format == "gguf":
        return _download(_gguf_chunks(services, version, files), f"{_stem(version)}.gguf")
    readme = card_markdown(_card(services, version, request)).encode()
    return _download(zip_chunks({**files, README_NAME: readme}), f"{_stem(version)}.zip")


@router.get("/v1/adapters/{model:path}")
def get_adapter(model: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """By version id, checkpoint id or alias."""
    version = services.registry.version(tenant.id, model)
    return adapter_body(version, services.registry.aliases.list(tenant.id), services.registry)


def adapter_body(version: AdapterVersion, aliases: Sequence[Alias], registry: Registry) -> dict[str, Any]:
    return {
        "id": version.id,
        "object": "adapter",
        "digest": version.digest,
        "origin": (version.provenance or {}).get("origin"),
        "job": version.job_id,
        "step": version.step,
        "base_model": version.base_model,
        "base_fingerprint": version.base_fingerprint,
        "stale": not registry.serves(version),
        "metrics": dict(version.metrics),
        "created_at": int(version.created_at),
        "aliases": [alias.name for alias in aliases if alias.model == version.id],
    }


def _card(services: Services, version: AdapterVersion, request: Request) -> dict[str, Any]:
    aliases = services.registry.aliases
    try:
        files = services.store.manifest(version.digest)
    except (AdapterNotFoundError, AdapterDamagedError):
        files = None
    return make_card(
        version,
        moves=aliases.moves_to(version.tenant_id, version.id),
        active=[alias.name for alias in aliases.list(version.tenant_id) if alias.model == version.id],
        files=files,
        url=_reached_at(request),
        stale=not services.registry.serves(version),
    )


def _reached_at(request: Request) -> str:
    """The url that the client used; nothing of the machine's own names."""
    url = str(request.base_url).rstrip("/")
    return url if re.fullmatch(r"https?://[A-Za-z0-9.:\[\]_/-]+", url) else "https://YOUR-SERVICE"


def _gguf_chunks(services: Services, version: AdapterVersion, files: AdapterFiles) -> Iterator[bytes]:
    """Written whole before the first byte leaves, so that an adapter which cannot be one is a 400."""
    from service.engine.checkpoint import base_config  # attention kernels, which the API's process does without

    weights = read_adapter(files, services.base.signature, max_rank=services.settings.max_lora_rank)
    with tempfile.TemporaryDirectory(prefix="rootstock-gguf-") as folder:
        path = Path(folder) / "adapter.gguf"
        write_gguf(path, weights, base_config(services.settings.base), name=version.id)
        stream = path.open("rb")
    return _closing(stream)  # unlinked already: gone with its last reader


def _closing(stream: Any) -> Iterator[bytes]:
    with stream:
        yield from iter(lambda: stream.read(_CHUNK_BYTES), b"")


def _download(chunks: Iterator[bytes], filename: str) -> StreamingResponse:
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}"}
    return StreamingResponse(chunks, headers=headers, media_type="application/octet-stream")


def _stem(version: AdapterVersion) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", version.id)


def _understand(form: FormData) -> tuple[UploadFile, str, str | None]:
    for name in form:
        if name not in _FIELDS:
            raise InvalidRequestError(
                f"Unrecognized request argument supplied: '{name}'.", param=name, code="unknown_parameter"
            )
    upload, suffix, alias = (form.get(name) for name in _FIELDS)
    if not isinstance(upload, UploadFile):
        raise InvalidRequestError(
            "Send a zip of the adapter's directory as multipart/form-data, in a part named 'file' with a file name.",
            param="file",
            code="missing_required_parameter",
        )
    if not isinstance(suffix, str):
        raise InvalidRequestError(
            "Missing required parameter: 'suffix', a part of the model's id.",
            param="suffix",
            code="missing_required_parameter",
        )
    if alias is not None and not isinstance(alias, str):
        raise InvalidRequestError("'alias' must be a name.", param="alias")
    return upload, suffix, alias


def _printable(name: str) -> str:
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(character for character in last if character.isprintable())[:255]
