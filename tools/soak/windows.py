"""When something was killed on purpose, or nothing ran at all: what fails then is no fault. Knows no failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

TICK_SECONDS = 0.1
STANDSTILL_SECONDS = 2.0


@dataclass
class Window:
    what: str
    start: float
    end: float | None = None
    """None while it is open."""


@dataclass
class Windows:
    """`grace_seconds` follow each: who was told to come again in a moment may just have been on the way."""

    grace_seconds: float = 1.0
    windows: list[Window] = field(default_factory=list)
    still_seconds: float = 0.0
    """For how long this whole machine stood still, or this process and the service with it."""

    async def watch_for_standstills(self) -> None:
        """A clock that jumps means that nobody was running, so that no deadline of anybody's says anything."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            if now - last > STANDSTILL_SECONDS:
                self.windows.append(Window("all stood still", last, now))
                self.still_seconds += now - last
            last = now

    @contextmanager
    def around(self, what: str) -> Iterator[None]:
        window = Window(what, time.monotonic())
        self.windows.append(window)
        try:
            yield
        finally:
            window.end = time.monotonic()

    def excuse(self, start: float, end: float) -> str | None:
        """What was killed while a request ran, if anything."""
        for window in self.windows:
            if end >= window.start and (window.end is None or start <= window.end + self.grace_seconds):
                return window.what
        return None
