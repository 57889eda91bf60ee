"""Ten times what the queue holds, at once: who is accepted is answered, the rest is told so quickly. Knows no tenant's
other doings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import httpx

from tools.soak.generation import CHAT, MAX_PROMPT_TOKENS
from tools.soak.ledger import percentiles
from tools.soak.tenant import Tenant
from tools.soak.windows import TICK_SECONDS

NUM_LONE = 15
"""Requests of one client alone, before and after."""
LIMIT_SECONDS = 60.0
"""The flood's requests say so themselves: `timeout`."""
MAX_TOKENS = 24
MAX_TRIES = 3


@dataclass(frozen=True)
class Flood:
    num_requests: int
    num_accepted: int
    num_refused: int
    refusal_seconds: dict[str, float]
    accepted_seconds: dict[str, float]
    lone_before_seconds: float
    lone_after_seconds: float
    seconds_until_lone: float
    """From the flood's last answer to the end of the first lone request."""

    @property
    def lone_ratio(self) -> float:
        return self.lone_after_seconds / self.lone_before_seconds

    def summary(self) -> dict[str, Any]:
        return {**asdict(self), "lone_ratio": round(self.lone_ratio, 3)}


async def flood(tenants: Sequence[Tenant], num_requests: int) -> Flood:
    """Again where the machine stood still meanwhile: what it took then says nothing."""
    windows = tenants[0].shared.caller.windows
    for _ in range(MAX_TRIES):
        still = windows.still_seconds
        seen = await _flood(tenants, num_requests)
        await asyncio.sleep(2 * TICK_SECONDS)  # for a standstill to be noticed
        if windows.still_seconds == still:
            break
    return seen


async def _flood(tenants: Sequence[Tenant], num_requests: int) -> Flood:
    """All tenants ask at once, over a connection for each request."""
    caller, ledger = tenants[0].shared.caller, tenants[0].shared.caller.ledger
    lone_before = [await _lone(tenants[0]) for _ in range(NUM_LONE)]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=caller.url, timeout=120.0, limits=limits, trust_env=False) as http:
        asked = [_one(http, tenants[number % len(tenants)]) for number in range(num_requests)]
        answers = await asyncio.gather(*asked)
    end = time.monotonic()
    lone_after = [await _lone(tenants[0])]
    until_lone = time.monotonic() - end
    lone_after += [await _lone(tenants[0]) for _ in range(NUM_LONE - 1)]
    refused = [seconds for status, seconds in answers if status == 429]
    accepted = [seconds for status, seconds in answers if status == 200]
    ledger.expect(bool(accepted) and bool(refused), "a flood is partly accepted, partly refused", len(accepted))
    return Flood(
        num_requests,
        len(accepted),
        len(refused),
        percentiles(refused or [0.0]),
        percentiles(accepted or [0.0]),
        median(lone_before),
        median(lone_after),
        round(until_lone, 4),
    )


async def _one(http: httpx.AsyncClient, tenant: Tenant) -> tuple[int, float]:
    """Status, 0 for a broken connection, and seconds."""
    caller, books = tenant.shared.caller, tenant.shared.books
    body = {**_BODY, "max_tokens": MAX_TOKENS, "timeout": LIMIT_SECONDS}
    start = time.monotonic()
    try:
        response = await http.post(CHAT, json=body, headers={"authorization": f"Bearer {tenant.key}"})
    except httpx.TransportError as error:
        await caller.broken("flood", start, repr(error))
        books.cut_short(tenant.account, MAX_PROMPT_TOKENS, MAX_TOKENS)
        return 0, 0.0
    seconds = time.monotonic() - start
    if await caller.accept("flood", start, response):
        books.told(tenant.account, response.json()["usage"])
    elif response.status_code != 429:
        books.cut_short(tenant.account, MAX_PROMPT_TOKENS, MAX_TOKENS)
    return response.status_code, seconds


async def _lone(tenant: Tenant) -> float:
    start = time.monotonic()
    body = await tenant.shared.caller.json("lone request", "POST", CHAT, tenant.key, json={**_BODY, "max_tokens": 8})
    if body is not None:
        tenant.shared.books.told(tenant.account, body["usage"])
    return time.monotonic() - start


_BODY = {
    "model": "soaked",
    "messages": [{"role": "user", "content": "all at once"}],
    "temperature": 0,
    "ignore_eos": True,
}
