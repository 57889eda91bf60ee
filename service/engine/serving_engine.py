"""What the service asks of an engine, wherever it runs: in this process (`engine`) or in its own (`remote_engine`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import numpy as np
from numpy.typing import NDArray

from service.engine.base_description import BaseDescription
from service.engine.errors import EmbeddingFailedError
from service.engine.observation import EngineStats
from service.engine.outbox import Outbox
from service.engine.sequence import GenerationRequest, OutputChunk


class ServingEngine(ABC):
    """Requests go in from any thread or event loop, chunks come back by callback or as a stream."""

    base: BaseDescription
    embedding_size: int | None
    """Of an embedding; None when this base does not show its hidden states."""

    def __init__(self) -> None:
        self._outbox = Outbox()

    @property
    def process_id(self) -> int | None:
        """Of the process it runs in; None where that is this one."""
        return None

    @abstractmethod
    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None:
        """Queue a request; `on_chunk` is called in a thread of the engine's: be quick.

        A refusal is raised, or it comes as the only chunk (`refusal`): whichever the engine can do.

        Raises:
            RequestRejectedError: the request can never run.
            QueueFullError: `max_waiting` requests wait already.
            EngineDeadError: the engine is stopping or has stopped.
        """

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """End a request whose client has gone. Unknown or finished ids are no error: the end may be on its way."""

    @abstractmethod
    def retire(self, digest: str) -> None:
        """A deleted adapter: running sequences finish on it, then its slot is free."""

    @abstractmethod
    def forget_tenant(self, tenant: str) -> None:
        """A deleted tenant: its running and waiting sequences end with an error, as does whatever still comes in its
        name, and what was computed for it is dropped."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """The picture after one of the last steps; `busy_since` shows a step that hangs."""

    @property
    def num_open(self) -> int:
        """Requests that came in here and have not ended: known at once, where `stats` may be late."""
        stats = self.stats()
        return stats.num_running + stats.num_waiting

    @property
    def last_ended_at(self) -> float | None:
        """When the latest of them did, by `time.monotonic()`."""
        return self.stats().last_step_at

    @abstractmethod
    def shutdown(self, drain_seconds: float) -> None:
        """Take nothing new, let running answers finish for `drain_seconds`, end the rest with an error.

        Whatever else runs beside it is told to stop at once. May be called again, from another thread, to wait less.
        """

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[OutputChunk]:
        """Stream one answer. Closing the iterator aborts the sequence. Raises, before the first chunk, as `submit`."""
        queue, put = self._outbox.open()
        self.submit(request, put)
        finished = False
        try:
            while not finished:
                chunk = await queue.get()
                finished = chunk.finish_reason is not None
                if chunk.refusal is not None:
                    raise chunk.refusal
                yield chunk
        finally:
            if not finished:
                self.abort(request.request_id)

    async def embed(self, request: GenerationRequest) -> NDArray[np.float32]:
        """The embedding of a prompt, [embedding_size]: the base's own or, with `adapter`, the adapter's.

        The request is one with `pooling`. Cancelling aborts the sequence. Raises as `generate` does, and
        EmbeddingFailedError when the engine gives up on it later.
        """
        assert request.pooling, "generate() answers this one"
        async with aclosing(self.generate(request)) as chunks:
            chunk = await anext(chunks)
        if chunk.embedding is None:
            raise EmbeddingFailedError(f"The embedding could not be computed: {chunk.error or 'it was aborted'}.")
        return chunk.embedding
