"""Greedy answers from the running engine for a background task, behind everybody else's requests.

Knows the engine's messages, not why the answers are wanted.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from service.engine.errors import EngineDeadError, QueueFullError
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk, SamplingParams

BACKGROUND_PRIORITY = -10
MAX_IN_FLIGHT = 8
CHECK_SECONDS = 0.2


class Submitting(Protocol):
    """The part of `Engine` that is needed here."""

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None: ...

    def abort(self, request_id: str) -> None: ...


class BackgroundGeneration:
    """`adapters.evaluation.Generate` on an engine, for one tenant.

    `check` is called while waiting; what it raises ends the wait and aborts the requests.
    """

    def __init__(self, engine: Submitting, tenant: str, check: Callable[[], None]) -> None:
        self._engine = engine
        self._tenant = tenant
        self._check = check

    def __call__(self, prompts: list[list[int]], adapter: str | None, max_tokens: int) -> list[list[int]]:
        """The generated tokens of each prompt. Raises EngineDeadError when the engine cannot answer."""
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting = deque(range(len(prompts)))
        in_flight: dict[str, int] = {}
        chunks: SimpleQueue[tuple[str, OutputChunk]] = SimpleQueue()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        try:
            while waiting or in_flight:
                self._check()
                while waiting and len(in_flight) < MAX_IN_FLIGHT:
                    request_id = f"eval-{uuid.uuid4().hex}"
                    request = GenerationRequest(
                        request_id,
                        tuple(prompts[waiting[0]]),
                        sampling,
                        self._tenant,
                        adapter,
                        priority=BACKGROUND_PRIORITY,
                    )
                    if not self._submit(request, chunks):
                        break
                    in_flight[request_id] = waiting.popleft()
                try:
                    request_id, chunk = chunks.get(timeout=CHECK_SECONDS)
                except Empty:
                    continue
                outputs[in_flight[request_id]].extend(chunk.token_ids)
                if chunk.finish_reason is not None:
                    del in_flight[request_id]
                    if chunk.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                        raise EngineDeadError(chunk.error or f"the engine ended an answer: {chunk.finish_reason}")
        finally:
            for request_id in in_flight:
                self._engine.abort(request_id)
        return outputs

    def _submit(self, request: GenerationRequest, chunks: SimpleQueue[tuple[str, OutputChunk]]) -> bool:
        """False when the engine's queue is full: others come first, try again later."""
        try:
            self._engine.submit(request, lambda chunk: chunks.put((request.request_id, chunk)))
        except QueueFullError:
            return False
        return True
