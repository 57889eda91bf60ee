"""Many streaming chat clients in a process of their own, so that reading answers costs the server no lock.

Run as `python -m bench.clients`. Reads one JSON object per line from standard input, `{"url", "key", "bodies"}`,
sends all bodies at once, and writes one JSON object about their answers. Imports nothing heavy: it starts in
a blink and its own work per token is a search in a few bytes.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any
from urllib.parse import urlsplit

DONE = b"data: [DONE]"
_TEXT = re.compile(rb'"content": ?"[^"]')
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')


async def _ask(host: str, port: int, request: bytes) -> dict[str, float]:
    """One streamed answer: its tokens, and when its first text was there."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    received = bytearray()
    first_text_at = 0.0
    while DONE not in received[-64:]:
        piece = await reader.read(65536)
        if not piece:
            raise RuntimeError(f"the answer ends without {DONE.decode()}: {bytes(received[-500:])!r}")
        received += piece
        if not first_text_at and _TEXT.search(received):
            first_text_at = time.perf_counter()
    writer.close()
    usage = _COMPLETION_TOKENS.search(received)
    if usage is None or not first_text_at:
        raise RuntimeError(f"no text or no usage in the answer: {bytes(received[-500:])!r}")
    return {"tokens": int(usage[1]), "first_text_at": first_text_at}


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
        print(json.dumps(asyncio.run(_ask_all(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
