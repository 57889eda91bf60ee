"""The service is going: whether it has begun, and who is still being answered. Knows no HTTP and no signal.

Belongs to the event loop of the API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import UnavailableError

RETRY_AFTER_SECONDS = 5.0
"""For the next place, or the successor, to be there; the official client obeys it."""


class Drain:
    """Requests that are being answered go on; those that come after `begin` are refused."""

    def __init__(self) -> None:
        self.begun = False
        self.num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        self.begun = True

    def check(self) -> None:
        """Raises UnavailableError once it has begun."""
        if self.begun:
            raise UnavailableError(
                "The service is shutting down; please try again.", retry_after=RETRY_AFTER_SECONDS, code="draining"
            )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """One request, from its arrival to its last byte."""
        self.num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if not self.num_open:
                self._idle.set()

    async def wait(self, seconds: float) -> bool:
        """Until nobody is being answered; False when that took longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
