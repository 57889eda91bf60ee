"""How soon a service answers a small request, and how late its event loop is, while something else goes on.

Asks from a thread of this process, which is idle meanwhile. Knows no load.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from statistics import median
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.traffic import p99

INTERVAL_SECONDS = 0.02
FIRST_BYTE, LAG = "first byte of GET /v1/models", "event-loop lag"
QUANTITIES = (f"{FIRST_BYTE}, p50", f"{FIRST_BYTE}, p99", f"{LAG}, p99")
"""All in milliseconds; the lag is the upper bound of its bucket."""

_HISTOGRAM = "rootstock_event_loop_lag_seconds"


def probe(url: str, ops_url: str, key: str, load: Callable[[], Any]) -> dict[str, float]:
    """The quantities over the time that `load` takes."""
    before = _lag_buckets(ops_url)
    over = Event()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(_first_bytes, url, key, over)
        try:
            load()
        finally:
            over.set()
        seconds = asking.result()
    after = _lag_buckets(ops_url)
    lag = quantile_bound({bound: after[bound] - before[bound] for bound in after}, 0.99)
    return dict(zip(QUANTITIES, (median(seconds) * 1e3, p99(seconds) * 1e3, lag * 1e3), strict=True))


def quantile_bound(cumulative: dict[float, float], share: float) -> float:
    """The smallest bound of a histogram below which lies this share of what it counted."""
    total = max(cumulative.values())
    if not total:
        raise ValueError("the histogram counted nothing")
    return min(bound for bound, number in cumulative.items() if number >= share * total)


def _first_bytes(url: str, key: str, over: Event) -> list[float]:
    """One request after the other on one connection, from sending it to the head of its answer."""
    target = urlsplit(f"{url}/models")
    assert target.hostname is not None
    connection = HTTPConnection(target.hostname, target.port, timeout=60)
    found: list[float] = []
    try:
        while not (over.wait(INTERVAL_SECONDS) and len(found) > 1):  # a percentile needs two
            start = time.perf_counter()
            connection.request("GET", target.path, headers={"authorization": f"Bearer {key}"})
            answer = connection.getresponse()
            found.append(time.perf_counter() - start)
            body = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"GET {target.path}: {answer.status} {body[:200]!r}")
    finally:
        connection.close()
    return found


def _lag_buckets(ops_url: str) -> dict[float, float]:
    text = httpx.get(f"{ops_url}/metrics").raise_for_status().text
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(text)
        if family.name == _HISTOGRAM
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }
