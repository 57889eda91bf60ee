"""How late an event loop runs what is due: whatever blocks the loop, delays every answer by that much.

Knows no metric and no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

INTERVAL_SECONDS = 0.02


@asynccontextmanager
async def watching_loop_lag(
    observe: Callable[[float], None], interval_seconds: float = INTERVAL_SECONDS
) -> AsyncIterator[None]:
    """While inside, tell `observe` by how many seconds each sleep of the running loop was too long."""
    task = asyncio.create_task(_watch(observe, interval_seconds))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _watch(observe: Callable[[float], None], interval_seconds: float) -> None:
    while True:
        due = time.monotonic() + interval_seconds  # uvloop's own clock stands still while a callback runs
        await asyncio.sleep(interval_seconds)
        observe(max(0.0, time.monotonic() - due))
