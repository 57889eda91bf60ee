"""Answers and measures of the running engine for a background task, behind everybody else's requests.

Knows the engine's messages, not why they are wanted.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
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
        """The generated tokens of each prompt, greedily. Raises EngineDeadError when the engine cannot answer."""
        outputs: list[list[int]] = [[] for _ in prompts]
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        requests = [
            GenerationRequest(
                f"eval-{uuid.uuid4().hex}",
                tuple(prompt),
                sampling,
                self._tenant,
                adapter,
                priority=BACKGROUND_PRIORITY,
            )
            for prompt in prompts
        ]
        with closing(background_chunks(self._engine, requests, self._check)) as chunks:
            for index, chunk in chunks:
                outputs[index].extend(chunk.token_ids)
        return outputs


def probe_prompts(
    engine: Submitting, tenant: str, prompts: Sequence[tuple[int, ...]], check: Callable[[], None]
) -> list[OutputChunk]:
    """What the base makes of each prompt: chunks with `embedding` and `prompt_nll`. `check` and errors as above."""
    requests = [
        GenerationRequest.probe(f"probe-{uuid.uuid4().hex}", prompt, tenant, priority=BACKGROUND_PRIORITY)
        for prompt in prompts
    ]
    with closing(background_chunks(engine, requests, check)) as chunks:
        found = dict(chunks)
    return [found[index] for index in range(len(prompts))]


def background_chunks(
    engine: Submitting, requests: Sequence[GenerationRequest], check: Callable[[], None]
) -> Generator[tuple[int, OutputChunk]]:
    """The chunks of all requests, each with its request's index; a few are under way at a time. Closing aborts them."""
    waiting = deque(range(len(requests)))
    in_flight: dict[str, int] = {}
    chunks: SimpleQueue[tuple[str, OutputChunk]] = SimpleQueue()
    try:
        while waiting or in_flight:
            check()
            while waiting and len(in_flight) < MAX_IN_FLIGHT:
                request = requests[waiting[0]]
                if not _submit(engine, request, chunks, check):
                    break
                in_flight[request.request_id] = waiting.popleft()
            try:
                request_id, chunk = chunks.get(timeout=CHECK_SECONDS)
            except Empty:
                continue
            yield in_flight[request_id], chunk
            if chunk.finish_reason is not None:
                del in_flight[request_id]
                if chunk.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                    check()  # it may be ending because everything is: then this is no failure
                    raise EngineDeadError(chunk.error or f"the engine ended an answer: {chunk.finish_reason}")
    finally:
        for request_id in in_flight:
            engine.abort(request_id)


def _submit(
    engine: Submitting,
    request: GenerationRequest,
    chunks: SimpleQueue[tuple[str, OutputChunk]],
    check: Callable[[], None],
) -> bool:
    """False when the engine's queue is full: others come first, try again later."""
    try:
        engine.submit(request, lambda chunk: chunks.put((request.request_id, chunk)))
    except QueueFullError:
        return False
    except EngineDeadError:
        check()
        raise
    return True
