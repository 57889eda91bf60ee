"""What the API's own description says of failures and of answers that are no JSON. Knows no route.

Every failure of every route has one shape, so it is declared once, for all of 4xx and 5xx.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

Responses = dict[int | str, dict[str, Any]]


class ErrorDetail(BaseModel):
    """As OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


FAILURES: Responses = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered as it is; `param` names the field."},
    "5XX": {"model": ErrorBody, "description": "The service cannot answer it now."},
}


def answers(*media_types: str) -> Responses:
    """Of a successful answer in any of these."""
    content: dict[str, Any] = {}
    for media_type in media_types:
        content[media_type] = {"schema": {} if media_type == "application/json" else {"type": "string"}}
    return {200: {"description": "Success", "content": content}}


def form_body(required: tuple[str, ...], fields: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A multipart body that the route reads by itself, for `openapi_extra`."""
    schema = {"type": "object", "required": list(required), "properties": dict(fields), "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
