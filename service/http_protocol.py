"""A connection that may not send its heads without end: bounded in bytes and in time. Knows no route and no body.

uvicorn bounds neither when it parses with httptools. What is refused here has reached no application, so it is answered
here, in OpenAI's shape like everything else.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import error_body

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers together."""
HEAD_SECONDS = 20.0
"""From the first byte of a request, or from the connection, until its last header."""


class _HeadTooLargeError(Exception):
    """Ends the parsing; the answer is written by `send_400_response`, as for whatever cannot be parsed."""


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's connection with bounds; `uvicorn.Config(http=BoundedHttp)`."""

    _head_bytes = 0
    _in_head = True
    _head_timer: asyncio.TimerHandle | None = None
    _refusal = HTTPStatus.BAD_REQUEST

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_begins()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A head may come in any number of pieces; one that has not ended is counted piece by piece."""
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_begins()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise _HeadTooLargeError
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Called for whatever the parser does not take."""
        self._refuse(self._refusal)

    def _head_begins(self) -> None:
        self._in_head = True
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: HTTPStatus) -> None:
        self._stop_timer()
        messages = {
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"The request's headers are over {MAX_HEAD_BYTES} bytes.",
            HTTPStatus.REQUEST_TIMEOUT: f"The request's headers took longer than {HEAD_SECONDS:g} seconds.",
        }
        message = messages.get(status, "This is no valid HTTP/1.1 request.")
        body = json.dumps(error_body(message, "invalid_request_error", code="invalid_http")).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\ncache-control: no-store\r\nx-content-type-options: nosniff\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
