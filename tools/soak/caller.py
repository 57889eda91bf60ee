"""Sends requests and puts every answer into the ledger: wanted, excused by a kill, or a violation. Knows no tenant."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from tools.soak.ledger import Ledger
from tools.soak.windows import Windows

TIMEOUT_SECONDS = 120.0
BACK_OFF_SECONDS = 0.5
"""After a request that a kill cost: the service needs its time."""
ERROR_FIELDS = {"message", "type", "param", "code"}
SHEDS = frozenset({"engine_overloaded", "rate_limit_exceeded"})


@dataclass
class Caller:
    """Every method answers None for a request whose answer is of no more use; the ledger knows why."""

    url: str
    ledger: Ledger
    windows: Windows

    def __post_init__(self) -> None:
        self._open()

    def _open(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self.http = httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_SECONDS, limits=limits, trust_env=False)

    async def reconnect(self) -> None:
        """Leave no connection behind that could be taken for the service's own."""
        await self.http.aclose()
        self._open()

    async def send(
        self,
        operation: str,
        method: str,
        path: str,
        key: str,
        *,
        expect: Collection[int] = (200,),
        **options: Any,
    ) -> httpx.Response | None:
        """The answer when its status is expected. `options` are httpx's."""
        start = time.monotonic()
        try:
            response = await self.http.request(
                method, path, headers={"authorization": f"Bearer {key}", **options.pop("headers", {})}, **options
            )
        except httpx.TransportError as error:
            await self.broken(operation, start, repr(error))
            return None
        if not await self.accept(operation, start, response, expect):
            return None
        self.took(operation, start)
        return response

    async def json(self, operation: str, method: str, path: str, key: str, **options: Any) -> dict[str, Any] | None:
        """The body of a successful answer; None for an expected failure, too."""
        response = await self.send(operation, method, path, key, **options)
        if response is None or response.status_code >= 400:
            return None
        body: dict[str, Any] = response.json()
        return body

    async def accept(
        self, operation: str, start: float, response: httpx.Response, expect: Collection[int] = (200,)
    ) -> bool:
        """Count an answer that was read whole; whether it is one of those that were wanted."""
        status, error = response.status_code, _error(response)
        code = "" if error is None else str(error.get("code"))
        if status >= 400 and self._shape(operation, response, error) and status == 429:
            seconds = response.headers.get("retry-after", "")
            right = seconds.isdecimal() and 1 <= int(seconds) <= 120
            self.ledger.expect(right, "a 429 says when to come again", response.headers)
        if status in expect:
            self.ledger.count(operation, f"{status} {code}".strip())
            return True
        if status == 429 and code in SHEDS:
            self.ledger.count(operation, f"429 {code}")
            return False
        what = self.windows.excuse(start, time.monotonic())
        if (status >= 500 or status == 408) and what is not None:
            self.ledger.count(operation, f"{status} while: {what}")
            await asyncio.sleep(BACK_OFF_SECONDS)
            return False
        self.ledger.count(operation, f"{status} {code} UNEXPECTED")
        request = response.request
        self.ledger.violation(f"{operation}: {request.method} {request.url.path} {status} {response.text[:300]}")
        return False

    def took(self, operation: str, start: float, first_token: float | None = None) -> None:
        """Of a good answer; a kill's share in its time says nothing about the service."""
        now = time.monotonic()
        if self.windows.excuse(start, now) is None:
            self.ledger.took(operation, now - start, first_token)

    async def broken(self, operation: str, start: float, reason: str) -> None:
        """The connection failed, or the answer ended with an error."""
        what = self.windows.excuse(start, time.monotonic())
        if what is None:
            self.ledger.count(operation, "broken UNEXPECTED")
            self.ledger.violation(f"{operation}: {reason[:300]}")
        else:
            self.ledger.count(operation, f"cut short while: {what}")
            await asyncio.sleep(BACK_OFF_SECONDS)

    def _shape(self, operation: str, response: httpx.Response, error: Mapping[str, Any] | None) -> bool:
        right = error is not None and error.keys() == ERROR_FIELDS and bool(error["message"])
        right = right and "x-request-id" in response.headers
        return self.ledger.expect(right, "an error has OpenAI's shape", f"{operation} {response.text}")


def _error(response: httpx.Response) -> Mapping[str, Any] | None:
    if response.status_code < 400:
        return None
    try:
        error = json.loads(response.content)["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if isinstance(error, dict) else None
