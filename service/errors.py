"""Domain errors, and the ONE table that gives each an HTTP status. Knows no web framework.

    ServiceError
    ├── InvalidRequestError       the request is wrong; `param` names the field
    ├── ConflictError             right request, wrong moment (a finished job cannot be cancelled)
    ├── AuthenticationError       no key, or not one of ours
    ├── PermissionDeniedError     a known key that may not do this
    ├── QuotaExceededError        the tenant has as much of something as it may; `param` names the quota
    ├── NotFoundError             not there, or somebody else's: a tenant cannot tell which
    ├── TooLargeError             the body is over its limit
    ├── TooSlowError              the body comes in too slowly
    ├── UnsupportedEncodingError  the body is packed in a way that is not taken
    ├── RateLimitError            this tenant asks too much at once; `retry_after` seconds
    ├── UnavailableError          the service cannot answer now; `retry_after` seconds
    ├── DeadlineExceededError     the request's own time limit has passed
    ├── GenerationFailedError     the engine gave up on a sequence it had accepted
    └── ClientDisconnectedError   the client has gone; nobody reads the answer

Below them the table also places `adapters.errors.AdapterError` and `service.engine.errors.EngineError`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any

from adapters.errors import (
    AdapterDamagedError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    DatasetError,
    NoFreeSlotError,
    StoreError,
    TrainingError,
)
from service.engine.errors import (
    AdapterUnavailableError,
    EngineDeadError,
    EngineError,
    QueueFullError,
    RequestRejectedError,
)

INTERNAL_ERROR_MESSAGE = "The server had an error while processing your request."

MAX_RETRY_AFTER_SECONDS = 120
"""The official client ignores a longer `Retry-After` and falls back to its own short delays."""


class ServiceError(Exception):
    """Base of what the service raises for somebody else's input or state. The message goes to the client."""

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequestError(ServiceError):
    """The request is malformed, out of bounds or asks for something unsupported."""


class ConflictError(ServiceError):
    """The state does not allow it. Answered as 400: clients retry a 409, which could never help."""


class AuthenticationError(ServiceError):
    """The key is missing or unknown."""

    code = "invalid_api_key"


class PermissionDeniedError(ServiceError):
    """The key is known, but not for this."""

    code = "permission_denied"


class QuotaExceededError(ServiceError):
    """The tenant has as much of something as the administrator lets it have. No 429: waiting does not help."""

    code = "quota_exceeded"


class NotFoundError(ServiceError):
    """No such object for this tenant."""

    code = "not_found"


class TooLargeError(ServiceError):
    """The body is longer than the service accepts."""

    code = "request_too_large"


class TooSlowError(ServiceError):
    """The body comes in too slowly."""

    code = "request_timeout"


class UnsupportedEncodingError(ServiceError):
    """The body is compressed, which is not taken: a few bytes could become gigabytes."""

    code = "unsupported_encoding"


class RateLimitError(ServiceError):
    """The tenant is over its limit."""

    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, retry_after: float = 1.0, code: str | None = None, is_hopeless: bool = False
    ) -> None:
        """`is_hopeless`: this very request will be refused again."""
        super().__init__(message, code=code)
        self.retry_after = retry_after
        self.is_hopeless = is_hopeless


class UnavailableError(ServiceError):
    """Nobody's fault but ours: draining, overloaded, or the engine is dead."""

    code = "service_unavailable"

    def __init__(self, message: str, *, retry_after: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class DeadlineExceededError(ServiceError):
    """The answer was not finished within the request's time limit."""

    code = "deadline_exceeded"


class GenerationFailedError(ServiceError):
    """The engine gave up on a sequence that it had accepted."""

    code = "generation_failed"


class ClientDisconnectedError(ServiceError):
    """The client has gone; the answer is for the log only."""

    code = "client_disconnected"


STATUS: dict[type[Exception], tuple[int, str]] = {
    InvalidRequestError: (400, "invalid_request_error"),
    ConflictError: (400, "invalid_request_error"),
    AuthenticationError: (401, "authentication_error"),
    PermissionDeniedError: (403, "permission_error"),
    QuotaExceededError: (403, "insufficient_quota"),
    NotFoundError: (404, "invalid_request_error"),
    TooSlowError: (408, "timeout_error"),
    TooLargeError: (413, "invalid_request_error"),
    UnsupportedEncodingError: (415, "invalid_request_error"),
    RateLimitError: (429, "rate_limit_error"),
    ClientDisconnectedError: (499, "invalid_request_error"),
    GenerationFailedError: (500, "server_error"),
    DeadlineExceededError: (504, "timeout_error"),
    UnavailableError: (503, "service_unavailable_error"),
    DatasetError: (400, "invalid_request_error"),
    AdapterDamagedError: (503, "service_unavailable_error"),
    AdapterUnavailableError: (503, "service_unavailable_error"),
    AdapterFormatError: (400, "invalid_request_error"),
    AdapterNotFoundError: (404, "invalid_request_error"),
    NoFreeSlotError: (503, "service_unavailable_error"),
    StoreError: (503, "service_unavailable_error"),
    TrainingError: (500, "server_error"),
    AdapterError: (500, "server_error"),
    RequestRejectedError: (400, "invalid_request_error"),
    QueueFullError: (429, "rate_limit_error"),
    EngineDeadError: (503, "service_unavailable_error"),
    EngineError: (500, "server_error"),
    ServiceError: (500, "server_error"),
}
"""Exception -> (HTTP status, OpenAI error type); the nearest ancestor in the table decides."""


@dataclass(frozen=True)
class WireError:
    """An error as it leaves: status, `{"error": …}` body and headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def wire_error(error: Exception) -> WireError:
    """How `error` is told to a client. What is not in the table is a 500 that gives nothing away."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return _known(error, *STATUS[kind])
    return WireError(500, error_body("The server had an error while processing your request.", "server_error"))


def error_body(message: str, error_type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of every failed answer, in OpenAI's shape."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def _known(error: Exception, status: int, error_type: str) -> WireError:
    body = error_body(
        getattr(error, "message", str(error)),
        error_type,
        getattr(error, "param", None),
        getattr(error, "code", None),
    )
    headers: dict[str, str] = {}
    retry_after: float | None = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["retry-after"] = str(min(MAX_RETRY_AFTER_SECONDS, max(1, ceil(retry_after))))
    if isinstance(error, DeadlineExceededError):
        headers["x-should-retry"] = "false"  # the client asked for no longer than this
    if isinstance(error, RateLimitError) and error.is_hopeless:
        headers["x-should-retry"] = "false"
    if isinstance(error, (AdapterDamagedError, AdapterUnavailableError)) and retry_after is None:
        headers["x-should-retry"] = "false"  # nothing mends it by itself
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return WireError(status, body, headers)
