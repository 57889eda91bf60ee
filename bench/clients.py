"""Many streaming chat clients in a process of their own, so that reading answers costs the server no lock.

Run as `python -m bench.clients`. Reads one JSON object per line from standard input, `{"url", "key", "bodies"}`,
sends all bodies at once, and writes one JSON object about their answers. It shares the cores with what it measures,
so its own work per token is as little as Python allows: a callback that keeps the bytes.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

DONE = b"data: [DONE]"
_TEXT = re.compile(rb'"content": ?"[^"]')
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')


class _Answer(asyncio.Protocol):
    """One streamed answer: its tokens, and when its first text was there."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._received: list[bytes] = []
        self._first_text_at = 0.0
        self.result: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        if not self._first_text_at and _TEXT.search(data):
            self._first_text_at = time.perf_counter()

    def connection_lost(self, exc: Exception | None) -> None:
        received = b"".join(self._received)
        usage = _COMPLETION_TOKENS.search(received)
        if DONE not in received or usage is None or not self._first_text_at:
            self.result.set_exception(RuntimeError(f"no whole answer with text and usage: {received[-500:]!r}"))
        else:
            self.result.set_result({"tokens": int(usage[1]), "first_text_at": self._first_text_at})


async def _ask(host: str, port: int, request: bytes) -> dict[str, float]:
    _, answer = await asyncio.get_running_loop().create_connection(lambda: _Answer(request), host, port)
    return await answer.result


async def _ask_all(order: dict[str, Any]) -> dict[str, Any]:
    target = urlsplit(order["url"])
    assert target.hostname is not None and target.port is not None
    requests = [_request(target.path, target.netloc, order["key"], body) for body in order["bodies"]]
    start = time.perf_counter()
    answers = await asyncio.gather(*(_ask(target.hostname, target.port, request) for request in requests))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": sum(answer["tokens"] for answer in answers),
        "first_text_seconds": sorted(answer["first_text_at"] - start for answer in answers),
    }


def _request(path: str, netloc: str, key: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {netloc}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(uvloop.run(_ask_all(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
