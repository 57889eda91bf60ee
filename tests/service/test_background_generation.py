"""Answers for a background task: behind everybody else, bounded, and stopped when asked to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from service.background_generation import MAX_IN_FLIGHT, BackgroundGeneration
from service.engine.errors import EngineDeadError, QueueFullError
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk
from tests.service.tuning_fixtures import Workshop, tiny_base, workshop

__all__ = ["tiny_base", "workshop"]


class Recorder:
    """An engine that answers only when told to."""

    def __init__(self) -> None:
        self.requests: dict[str, tuple[GenerationRequest, Callable[[OutputChunk], None]]] = {}
        self.aborted: list[str] = []
        self.num_refusals = 0

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None:
        if self.num_refusals:
            self.num_refusals -= 1
            raise QueueFullError("full", retry_after=1.0)
        self.requests[request.request_id] = (request, on_chunk)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def answer_one(self, reason: FinishReason = FinishReason.STOP) -> None:
        """The oldest request gets its own last token twice, in two chunks."""
        if self.requests:
            request_id = next(iter(self.requests))
            request, on_chunk = self.requests.pop(request_id)
            for finish in (None, reason):
                on_chunk(OutputChunk("x", request.prompt_token_ids[-1:], None, finish, 1, 1))


def test_answers_come_in_the_order_of_the_prompts_and_never_too_many_at_once() -> None:
    engine = Recorder()
    most = 0

    def check() -> None:
        nonlocal most
        most = max(most, len(engine.requests))
        engine.answer_one()

    prompts = [[1, number] for number in range(30)]
    outputs = BackgroundGeneration(engine, "acme", check)(prompts, "digest", 5)
    assert outputs == [[number, number] for number in range(30)]
    assert most <= MAX_IN_FLIGHT


def test_requests_are_greedy_and_behind_everybody_else() -> None:
    engine = Recorder()
    seen: list[GenerationRequest] = []

    def check() -> None:
        seen.extend(request for request, _ in engine.requests.values())
        engine.answer_one()

    BackgroundGeneration(engine, "acme", check)([[1, 2]], None, 5)
    (request,) = seen
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0.0, 5)
    assert (request.tenant, request.adapter) == ("acme", None)
    assert request.priority < 0


def test_a_full_queue_is_tried_again() -> None:
    engine = Recorder()
    engine.num_refusals = 2
    assert BackgroundGeneration(engine, "acme", engine.answer_one)([[1, 2]], None, 5) == [[2, 2]]


def test_an_answer_that_ends_in_an_error_ends_the_task() -> None:
    engine = Recorder()
    generate = BackgroundGeneration(engine, "acme", lambda: engine.answer_one(FinishReason.ERROR))
    with pytest.raises(EngineDeadError):
        generate([[1, 2], [1, 3]], None, 5)


def test_what_check_raises_aborts_the_requests_in_flight() -> None:
    engine = Recorder()
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BackgroundGeneration(engine, "acme", check)([[1, number] for number in range(5)], None, 5)
    assert sorted(engine.aborted) == sorted(engine.requests)
    assert len(engine.aborted) == 5


def test_the_real_engine_gives_the_same_tokens_as_a_request_alone(workshop: Workshop) -> None:
    prompts = [workshop.base.render_chat([{"role": "user", "content": f"word {i}?"}]) for i in range(12)]
    outputs = BackgroundGeneration(workshop.engine, "acme", lambda: None)(prompts, None, 6)
    texts = [workshop.base.tokenizer.decode(output, skip_special_tokens=True) for output in outputs]
    assert all(0 < len(output) <= 6 for output in outputs)
    alone = workshop.answer("word 7?", None)
    assert alone.startswith(str(texts[7]).rstrip("�"))
