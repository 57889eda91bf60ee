"""Server-sent events: the bytes of one, and a response that cleans up when the client leaves. Knows no payload.

Starlette's own streaming rather than sse-starlette: that one ends running streams when the server is asked to
stop (here they may finish) and adds comments of its own between the events.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from anyio import CancelScope
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(payload: object) -> bytes:
    """One event that carries `payload` as JSON."""
    return f"data: {to_json(payload)}\n\n".encode()


class EventStream(StreamingResponse):
    """Sends `events`; awaits `release` afterwards, however it ends: finished, failed or disconnected."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], release: Callable[[], Awaitable[None]], headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await self._release()
