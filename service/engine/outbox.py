"""Chunks on their way to the event loops that wait for them. Knows no sequence and no text.

Everything but `open` is called in the engine's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from service.engine.sequence import OutputChunk

_Addressed = tuple[asyncio.Queue[OutputChunk], OutputChunk]


class Outbox:
    """Collects a step's chunks and hands them over together."""

    def __init__(self) -> None:
        self._chunks: dict[asyncio.AbstractEventLoop, list[_Addressed]] = {}

    def open(self) -> tuple[asyncio.Queue[OutputChunk], Callable[[OutputChunk], None]]:
        """A queue of the running event loop, and what puts a chunk on its way there."""
        queue: asyncio.Queue[OutputChunk] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        return queue, lambda chunk: self._chunks.setdefault(loop, []).append((queue, chunk))

    def deliver(self) -> None:
        """Hand this step's chunks to their event loops, one call each."""
        outbox, self._chunks = self._chunks, {}
        for loop, chunks in outbox.items():
            with suppress(RuntimeError):  # the loop is closed: its clients are gone
                loop.call_soon_threadsafe(_put_all, chunks)


def _put_all(chunks: list[_Addressed]) -> None:
    for queue, chunk in chunks:
        queue.put_nowait(chunk)
