"""What surrounds every request: its ids, its size limit, one log line, metrics, its trace, and no traceback."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response
from service.drain import Drain
from service.errors import (
    InvalidRequestError,
    ServiceError,
    TooLargeError,
    TooSlowError,
    UnsupportedEncodingError,
)
from service.log import log_ids
from service.metrics import Metrics, Origin
from service.tracing.traceparent import new_trace_id, trace_id_of

if TYPE_CHECKING:
    from service.tracing.request_trace import RequestTrace
    from service.tracing.traces import Traces

log = structlog.get_logger("service.http")

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")

CLIENT_CLOSED_REQUEST = 499

UPLOAD_PATHS = ("/v1/files", "/v1/adapters")
MULTIPART_OVERHEAD_BYTES = 64 * 1024
"""Boundaries and form fields around an uploaded file."""
BODY_GRACE_SECONDS = 30.0
MIN_BODY_BYTES_PER_SECOND = 16 * 1024
"""What a body has to come in at, once the grace is over."""

OPERATIONS = {
    "/v1/chat/": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/files": "files",
    "/v1/fine_tuning/": "fine_tuning",
    "/v1/models": "models",
    "/v1/aliases": "aliases",
    "/v1/feedback": "feedback",
    "/v1/drift": "drift",
    "/v1/usage": "usage",
    "/v1/keys": "keys",
    "/v1/admin/": "admin",
}
"""Prefix of the path -> the metric label `operation`."""
OTHER_OPERATION = "other"

SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
"""Of every answer: nobody between keeps it, and no browser makes a page of what a tenant wrote. (HSTS is for whoever
terminates TLS; no CORS header is ever sent.)"""


class RequestMiddleware:
    """Outermost of the API app: sets `request.state.request_id`, `.trace_id`, `.arrival` and `.trace`, and answers
    `x-request-id` and `x-trace-id`.

    A body over its limit is a 413, one that comes drop by drop a 408, a compressed one a 415, an exception nobody
    expected a 500, a request while the service drains a 503; all in OpenAI's shape. Whatever is logged on the way
    carries the ids.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        max_body_bytes: int,
        max_file_bytes: int,
        drain: Drain,
        traces: Traces | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._drain = drain
        self._traces = traces
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_file_bytes + MULTIPART_OVERHEAD_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._limit(scope), self._drain, self._traces)
        with log_ids(exchange.state), self._drain.answering():
            try:
                self._drain.check()
                exchange.check_head()
                await self._app(scope, exchange.receive, exchange.send)
            except ServiceError as error:
                if exchange.status is None:
                    await error_response(error)(scope, receive, exchange.send)
            except Exception:
                log.exception("request_failed", path=scope["path"])
                if exchange.status is None:
                    await error_response(RuntimeError())(scope, receive, exchange.send)
            finally:
                exchange.finish(self._metrics)

    def _limit(self, scope: Scope) -> int:
        uploads = scope["method"] == "POST" and scope["path"] in UPLOAD_PATHS
        return self._max_upload_bytes if uploads else self._max_body_bytes


class _Exchange:
    """One request and its answer, seen from the outside."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, max_bytes: int, drain: Drain, traces: Traces | None
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._whole = False
        self._drain = drain
        self._start = time.monotonic()
        self._headers = Headers(scope=scope)
        self._trace: RequestTrace | None = None
        if traces is not None:
            self._trace = traces.request(scope["method"], scope["path"], self._headers)
        self.status: int | None = None
        self.state: dict[str, Any] = scope.setdefault("state", {})
        self.state["request_id"] = _request_id(self._headers.get("x-request-id"))
        self.state["trace_id"] = _trace_id(self._trace, self._headers.get("traceparent"))
        self.state["trace"] = self._trace
        self.state["arrival"] = self._start

    def check_head(self) -> None:
        """Refuse before reading. Raises TooLargeError, UnsupportedEncodingError, InvalidRequestError."""
        encoding = self._headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise UnsupportedEncodingError("Send the body as it is: no 'Content-Encoding' is taken.")
        if "\0" in self._scope["path"] or b"%00" in self._scope["query_string"] or b"\0" in self._scope["query_string"]:
            raise InvalidRequestError("The URL holds a NUL character.", code="invalid_value")
        declared = self._headers.get("content-length", "")
        if declared.isdecimal():
            self._check(int(declared))

    async def receive(self) -> Message:
        message = await self._next_message()
        if message["type"] == "http.request":
            self._whole = not message.get("more_body", False)
            self._num_bytes += len(message.get("body", b""))
            self._check(self._num_bytes)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers["x-request-id"] = self.state["request_id"]
            headers["x-trace-id"] = self.state["trace_id"]
            if (rate_headers := self.state.get("rate_headers")) is not None:
                headers.update(rate_headers())
            if self._drain.begun:
                headers["connection"] = "close"  # the next request of this client shall find another place
        await self._send(message)

    def finish(self, metrics: Metrics) -> None:
        """Log, count and trace it."""
        state, path = self.state, self._scope["path"]
        seconds = time.monotonic() - self._start
        outcome = state.get("outcome") or _outcome(self.status)
        operation = next((label for prefix, label in OPERATIONS.items() if path.startswith(prefix)), OTHER_OPERATION)
        metrics.request_finished(Origin(operation, state["trace_id"]), state.get("tenant_id"), outcome, seconds)
        log.info(
            "request",
            method=self._scope["method"],
            path=path,
            status=self.status,
            outcome=outcome,
            seconds=round(seconds, 4),
        )
        if self._trace is not None:
            ids = {"request_id": state["request_id"], "tenant": state.get("tenant_id")}
            self._trace.ended(getattr(self._scope.get("route"), "path", None), self.status, outcome, ids)

    async def _next_message(self) -> Message:
        """Raises TooSlowError for a body that comes in drop by drop. What comes after the body may take any time."""
        if self._whole:
            return await self._receive()
        allowed = BODY_GRACE_SECONDS + self._num_bytes / MIN_BODY_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(self._start + allowed - time.monotonic()):
                return await self._receive()
        except TimeoutError:
            raise TooSlowError("The request's body came in too slowly.") from None

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise TooLargeError(f"The request body is over the limit of {self._max_bytes} bytes.")


def _outcome(status: int | None) -> str:
    if status is None or status == CLIENT_CLOSED_REQUEST:
        return "aborted"
    return "success" if status < 400 else "rejected" if status < 500 else "error"


def _request_id(sent: str | None) -> str:
    if sent is not None and _SANE_REQUEST_ID.fullmatch(sent):
        return sent
    return f"req_{uuid.uuid4().hex}"


def _trace_id(trace: RequestTrace | None, traceparent: str | None) -> str:
    """The trace's, else the caller's W3C trace id, else a new one."""
    return trace.trace_id if trace is not None else trace_id_of(traceparent) or new_trace_id()
