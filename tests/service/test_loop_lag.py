"""The event loop's lag, on a real loop."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.loop_lag import watching_loop_lag
from service.metrics import Metrics
from service.metrics.requests import LOOP_LAG_BUCKETS


def count_up_to(metrics: Metrics, seconds: float) -> float:
    assert seconds in LOOP_LAG_BUCKETS
    found = metrics.registry.get_sample_value("rootstock_event_loop_lag_seconds_bucket", {"le": str(float(seconds))})
    assert found is not None
    return found


def count(metrics: Metrics) -> float:
    found = metrics.registry.get_sample_value("rootstock_event_loop_lag_seconds_count")
    assert found is not None
    return found


def test_a_loop_blocked_for_200_ms_shows_in_the_histogram() -> None:
    metrics = Metrics()

    async def block() -> None:
        async with watching_loop_lag(metrics.loop_lagged, interval_seconds=0.01):
            await asyncio.sleep(0)  # the watcher sleeps now
            time.sleep(0.2)
            while not count(metrics):
                await asyncio.sleep(0)

    asyncio.run(block())
    assert count(metrics) - count_up_to(metrics, 0.15) == 1


def test_the_watch_goes_on_until_its_block_ends() -> None:
    lags: list[float] = []

    async def watch() -> int:
        async with watching_loop_lag(lags.append, interval_seconds=0.0):
            while len(lags) < 3:
                await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(watch()) == 1  # the test's own
    assert all(lag >= 0 for lag in lags)


def test_an_error_of_the_block_is_not_hidden() -> None:
    async def fail() -> None:
        async with watching_loop_lag(lambda seconds: None):
            raise ValueError("the server")

    with pytest.raises(ValueError, match="the server"):
        asyncio.run(fail())
