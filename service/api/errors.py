"""Turns whatever a route raises into OpenAI's error body. `service.errors` chooses the status, not this file."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from itertools import chain

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from adapters.errors import AdapterError
from service.api.wire import UNSUPPORTED, field_path
from service.database import AWAY
from service.engine.errors import EngineError
from service.errors import InvalidRequestError, ServiceError, UnavailableError, error_body, wire_error

log = structlog.get_logger("service.http")

DATABASE_RETRY_SECONDS = 2.0


def install_error_handlers(app: FastAPI) -> None:
    """Every failure of `app` leaves as `{"error": {message, type, param, code}}`.

    Exceptions outside the table pass through, to be logged and hidden by `service.api.middleware`.
    """
    app.add_exception_handler(ServiceError, _domain_error)
    app.add_exception_handler(AdapterError, _domain_error)
    app.add_exception_handler(EngineError, _domain_error)
    for kind in AWAY:
        app.add_exception_handler(kind, _database_away)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def error_response(error: Exception) -> JSONResponse:
    """The answer for `error`; a 500 that gives nothing away when the table does not know it."""
    wire = wire_error(error)
    return JSONResponse(wire.body, wire.status, wire.headers)


async def _domain_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(error)


async def _database_away(request: Request, error: Exception) -> JSONResponse:
    """Nothing was written: a transaction is committed as a whole or not at all."""
    log.warning("database_away", reason=type(error).__name__)
    message = "The service cannot reach its database at the moment: try again."
    return error_response(UnavailableError(message, retry_after=DATABASE_RETRY_SECONDS, code="database_unavailable"))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_request(error.errors()))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ServiceError):  # raised while FastAPI was reading the body
        return error_response(error.__cause__)
    message, code, headers = str(error.detail), None, error.headers
    if error.status_code == HTTPStatus.NOT_FOUND:
        message, code = f"Unknown request URL: {request.method} {request.url.path}", "unknown_url"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message, code = f"Not allowed to {request.method} on {request.url.path}", "method_not_supported"
        headers = {"allow": _allowed(request)}
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return JSONResponse(error_body(message, kind, code=code), error.status_code, headers)


def _allowed(request: Request) -> str:
    """Every method of the path; whoever raised the 405 knows only those of the first of its routes."""
    everything = chain(request.app.routes, *(router.routes for router in getattr(request.app.state, "routers", ())))
    routes = [route for route in everything if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in getattr(route, "methods", None) or ()}))


def invalid_request(errors: Sequence[dict[str, object]]) -> InvalidRequestError:
    """The first of pydantic's complaints in OpenAI's words, naming the field: `messages[0].role`."""
    first = errors[0]
    kind, reason = str(first["type"]), str(first["msg"]).removeprefix("Value error, ")
    location = first["loc"]
    assert isinstance(location, tuple)
    context = first.get("ctx")
    blamed = context.get("param") if isinstance(context, dict) else None
    param = field_path((*location[1:], blamed) if blamed else location[1:]) or None
    if kind == "json_invalid":
        return InvalidRequestError(
            f"We could not parse the JSON body of your request: {_json_reason(first)}.", code="invalid_json"
        )
    if param is None:
        return InvalidRequestError(
            "Send a JSON object as the body, with the header 'Content-Type: application/json'.",
            code="invalid_body",
        )
    if kind == "missing":
        return InvalidRequestError(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    if kind == "extra_forbidden":
        return InvalidRequestError(
            f"Unrecognized request argument supplied: '{param}'.", param=param, code="unknown_parameter"
        )
    if kind == UNSUPPORTED:
        return InvalidRequestError(f"Unsupported: '{param}' is {reason}.", param=param, code="unsupported_parameter")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return InvalidRequestError(f"Invalid value for '{param}': {reason}.", param=param, code=code)


def _json_reason(error: dict[str, object]) -> str:
    location, context = error["loc"], error.get("ctx")
    assert isinstance(location, tuple)
    reason = context.get("error", "invalid") if isinstance(context, dict) else "invalid"
    return f"{str(reason).lower()} (position {location[-1]})"
