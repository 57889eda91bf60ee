"""All sequences of one API request: submitted together, read as one stream, aborted when the client leaves.

Knows the engine's interface and the connection; `service.api.answer` shapes what comes out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from service.engine.errors import EngineError
from service.engine.sequence import AskedBy, FinishReason, GenerationRequest, OutputChunk
from service.errors import ClientDisconnectedError, DeadlineExceededError, GenerationFailedError
from service.metrics import Metrics, Origin

if TYPE_CHECKING:
    from service.engine.serving_engine import ServingEngine

T = TypeVar("T")
Indexed = tuple[int, OutputChunk]
"""A chunk and the index of the choice that it belongs to."""


class Generation:
    """Choice `i` is the `i`-th of `requests`. Whoever calls `start` must call `aclose`: it aborts what still runs."""

    def __init__(
        self, engine: ServingEngine, metrics: Metrics, requests: Sequence[GenerationRequest], origin: Origin
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._requests = requests
        self._origin = origin
        self._stream = self._single(0) if len(requests) == 1 else self._merged()
        self._first: Indexed | None = None

    @property
    def num_choices(self) -> int:
        return len(self._requests)

    async def start(self) -> None:
        """Wait for the first chunk, so that a refusal still gets a status of its own. Raises EngineError."""
        self._first = _checked(await anext(self._stream))

    async def chunks(self) -> AsyncGenerator[Indexed, None]:
        """Everything from the first chunk on. Raises EngineError, or GenerationFailedError in mid-stream."""
        assert self._first is not None, "chunks() before start()"
        yield self._first
        async for item in self._stream:
            yield _checked(item)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def _single(self, index: int) -> AsyncGenerator[Indexed, None]:
        request = self._requests[index]
        self._metrics.sequence_submitted(request.request_id, self._origin)
        try:
            async with aclosing(self._engine.generate(request)) as chunks:
                async for chunk in chunks:
                    yield index, chunk
        except EngineError:
            self._metrics.sequence_refused(request.request_id)
            raise

    async def _merged(self) -> AsyncGenerator[Indexed, None]:
        """The chunks of several sequences as they come."""
        queue: asyncio.Queue[Indexed | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(index, queue)) for index in range(len(self._requests))]
        try:
            num_open = len(tasks)
            while num_open:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, queue: asyncio.Queue[Indexed | Exception | None]) -> None:
        try:
            async with aclosing(self._single(index)) as chunks:
                async for item in chunks:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)


def _checked(item: Indexed) -> Indexed:
    chunk = item[1]
    if chunk.finish_reason is FinishReason.TIMEOUT:
        raise DeadlineExceededError("The answer was not finished within the request's time limit.")
    if chunk.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        raise GenerationFailedError(f"The answer could not be finished: {chunk.error or 'it was aborted'}.")
    return item


def origin_of(request: Request, operation: str) -> Origin:
    """For the metrics and the trace of what `request` makes the engine do."""
    state = request.state
    return Origin(operation, state.trace_id, state.arrival, state.trace)


def asked_by(request: Request) -> AskedBy:
    return AskedBy(request.state.request_id, request.state.trace_id)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientDisconnectedError."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError("The client has gone.")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
