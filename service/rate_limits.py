"""Requests and tokens per minute: one token bucket of each kind per tenant, in this process. Knows no HTTP, no SQL.

A bucket holds a minute's worth and is refilled all the time. A request reserves the most tokens that it may use and
gives back at its end what it did not, so that many at once cannot run over the limit together.
Several replicas each keep their own: a tenant may then have up to its limit at each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from service.errors import RateLimitError
from service.quotas import TenantLimits

MINUTE = 60.0
MAX_BUCKETS = 20_000
"""Full ones are forgotten above that: a new one is full as well."""


@dataclass
class Bucket:
    """`level` of `limit` is left at `at`; negative when more was used than was reserved."""

    limit: int
    level: float
    at: float

    def refill(self, limit: int, now: float) -> None:
        gained = (now - self.at) * limit / MINUTE
        if limit > self.limit:
            gained += limit - self.limit  # the administrator gave more: it shows at once
        self.limit, self.at = limit, now
        self.level = min(float(limit), self.level + max(0.0, gained))

    def wait_seconds(self, wanted: float) -> float:
        """Until `wanted` is there; 0 when it is."""
        return max(0.0, wanted - self.level) * MINUTE / self.limit


class RateLimits:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def count_request(self, tenant_id: str, limits: TenantLimits) -> None:
        """Raises RateLimitError, and counts nothing, when this minute's requests are used up."""
        self._take(tenant_id, "requests", limits.requests_per_minute, 1)

    def reserve(self, tenant_id: str, limits: TenantLimits, *, least: int, most: int) -> int:
        """Tokens for an answer: `most`, or what a full bucket holds but at least `least`. `settle` has to follow.

        Raises RateLimitError.
        """
        limit = limits.tokens_per_minute
        wanted = most if limit is None else max(least, min(most, limit))
        self._take(tenant_id, "tokens", limit, wanted)
        return wanted

    def settle(self, tenant_id: str, limits: TenantLimits, *, reserved: int, used: int) -> None:
        if limits.tokens_per_minute is None:
            return
        with self._lock:
            bucket = self._bucket(tenant_id, "tokens", limits.tokens_per_minute)
            bucket.level = min(float(bucket.limit), bucket.level + reserved - used)

    def headers(self, tenant_id: str, limits: TenantLimits) -> dict[str, str]:
        """OpenAI's headers, of those limits that there are."""
        found: dict[str, str] = {}
        for kind, limit in (("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute)):
            if limit is not None:
                with self._lock:
                    bucket = self._bucket(tenant_id, kind, limit)
                    left, seconds = bucket.level, bucket.wait_seconds(limit)
                found[f"x-ratelimit-limit-{kind}"] = str(limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(left)))
                found[f"x-ratelimit-reset-{kind}"] = shown_duration(seconds)
        return found

    def forget(self, tenant_id: str) -> None:
        with self._lock:
            for kind in ("requests", "tokens"):
                self._buckets.pop((tenant_id, kind), None)

    def _take(self, tenant_id: str, kind: str, limit: int | None, wanted: int) -> None:
        if limit is None:
            return
        with self._lock:
            bucket = self._bucket(tenant_id, kind, limit)
            seconds = bucket.wait_seconds(wanted)
            if seconds == 0.0:
                bucket.level -= wanted
                return
            left = max(0, int(bucket.level))
        if wanted > limit:
            raise RateLimitError(
                f"The request is too large for your limit of {limit} {kind} per minute: it may use {wanted} {kind}. "
                "Shorten the prompt or lower 'max_tokens'.",
                retry_after=MINUTE,
                is_hopeless=True,
            )
        seconds = min(MINUTE, seconds)
        raise RateLimitError(
            f"Rate limit reached for {kind} per minute: limit {limit}, remaining {left}, requested {wanted}. "
            f"Please try again in {shown_duration(seconds)}.",
            retry_after=seconds,
        )

    def _bucket(self, tenant_id: str, kind: str, limit: int) -> Bucket:
        """Refilled up to now. The caller holds the lock."""
        now, key = self._clock(), (tenant_id, kind)
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                self._forget_full(now)
            bucket = self._buckets[key] = Bucket(limit, float(limit), now)
        bucket.refill(limit, now)
        return bucket

    def _forget_full(self, now: float) -> None:
        for key, bucket in list(self._buckets.items()):
            bucket.refill(bucket.limit, now)
            if bucket.level >= bucket.limit:
                del self._buckets[key]


def shown_duration(seconds: float) -> str:
    """As OpenAI writes it: `1m12.5s`, `6.2s`, `340ms`."""
    milliseconds = ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds / 1000, MINUTE)
    return (f"{int(minutes)}m" if minutes else "") + f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
