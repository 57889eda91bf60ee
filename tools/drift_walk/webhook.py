"""Takes in what the service posts when drift changes, and checks who signed it. Knows no state of drift."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


@dataclass
class Webhook:
    """`received` are the bodies that were rightly signed; `refused` counts the others."""

    url: str = ""
    secret: str = field(default_factory=secrets.token_urlsafe)
    received: list[dict[str, Any]] = field(default_factory=list)
    refused: int = 0

    def take(self, body: bytes, signature: str) -> bool:
        """`signature` is `t=TIME,v1=HEX`: the HMAC-SHA256 of `TIME.BODY`."""
        given = dict(part.partition("=")[::2] for part in signature.split(","))
        signed = given.get("t", "").encode() + b"." + body
        if hmac.compare_digest(hmac.digest(self.secret.encode(), signed, hashlib.sha256).hex(), given.get("v1", "")):
            self.received.append(json.loads(body))
            return True
        self.refused += 1
        return False


@contextmanager
def listening() -> Iterator[Webhook]:
    """On a free port of this machine until the block ends."""
    webhook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(204 if webhook.take(body, self.headers["x-rootstock-signature"] or "") else 403)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """What came in is shown by the walk."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        webhook.url = f"http://127.0.0.1:{server.server_port}/drift"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield webhook
        finally:
            server.shutdown()
            thread.join()
