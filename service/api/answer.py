"""From a generation request to its HTTP answer, one body or a stream: what chat and completions share.

Each of them brings its prompts and an `AnswerShape`. Knows nothing of either's JSON.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from adapters.errors import AdapterError
from service.api.answer_watch import AnswerWatch
from service.api.generation import Generation, asked_by, origin_of, unless_disconnected
from service.api.keepsake import Keepsake
from service.api.schemas import GenerationParams
from service.api.services import Services
from service.api.sse import DONE, EventStream, event
from service.drift_intake import Turn
from service.engine.errors import EngineError
from service.engine.grammar import AnyGrammar
from service.engine.sequence import (
    AskedBy,
    FinishReason,
    GenerationRequest,
    OutputChunk,
    SamplingParams,
    TokenLogprob,
)
from service.errors import InvalidRequestError, ServiceError, wire_error
from service.routing import ResolvedModel, Route
from service.tenants import Tenant

NUM_SEEDS = 2**63
"""The engine's seeds lie in 0 … 2**63 - 1; those of clients are 64-bit and signed."""

Usage = Mapping[str, int | Mapping[str, int]]


@dataclass(frozen=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: ResolvedModel, services: Services) -> Head:
        fingerprint = f"fp_{services.base.fingerprint.removeprefix('sha256:')[:12]}"
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model.id, fingerprint)


@dataclass
class Choice:
    """What one sequence has generated so far."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, chunk: OutputChunk) -> None:
        self.text += chunk.text
        self.logprobs.extend(chunk.logprobs or ())
        self.finish_reason = chunk.finish_reason


class AnswerShape(Protocol):
    """How an endpoint writes its answer. `chunk_events` returns the bytes of zero or more events."""

    def body(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]: ...
    def chunk_events(self, index: int, chunk: OutputChunk) -> bytes: ...
    def usage_event(self, usage: Usage) -> bytes: ...


class _TokenCount:
    """Adds up the usage. A prompt counts once, however many choices it gets; cached is what none of them computed."""

    def __init__(self, num_choices_per_prompt: int) -> None:
        self._per_prompt = num_choices_per_prompt
        self._prompt: dict[int, int] = {}
        self._completion: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    def add(self, index: int, chunk: OutputChunk) -> None:
        prompt = index // self._per_prompt
        self._prompt[prompt] = chunk.num_prompt_tokens
        self._cached[prompt] = min(chunk.num_cached_tokens, self._cached.get(prompt, chunk.num_cached_tokens))
        self._completion[index] = chunk.num_output_tokens

    def usage(self) -> Usage:
        prompt, completion = sum(self._prompt.values()), sum(self._completion.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


@dataclass(frozen=True)
class Ask:
    """A request, understood: whose, which model answers, how to sample, and the prompts as tokens; `keepsake` is what
    may be kept of it."""

    operation: str
    head: Head
    tenant: Tenant
    route: Route
    params: GenerationParams
    prompts: Sequence[tuple[int, ...]]
    max_tokens: int | None
    logprobs: int | None
    keepsake: Keepsake | None = None
    grammar: AnyGrammar | None = None
    turn: Turn | None = None
    """What the watch for drift has to know of a conversation's first turn; None for a later one."""

    @property
    def model(self) -> ResolvedModel:
        return self.route.model

    def check_lengths(self, max_model_len: int, param: str) -> None:
        """Raises InvalidRequestError when a prompt and its answer cannot fit the context."""
        for prompt in self.prompts:
            wanted = self.max_tokens or 1
            if len(prompt) + wanted > max_model_len:
                raise InvalidRequestError(
                    f"This model's maximum context length is {max_model_len} tokens. However, you requested "
                    f"{len(prompt) + wanted} tokens ({len(prompt)} in the {param}, {wanted} in the completion). "
                    f"Please reduce the length of the {param} or completion.",
                    param=param,
                    code="context_length_exceeded",
                )

    def requests(
        self, max_seconds: float | None, *, measure: bool, asked: AskedBy | None = None
    ) -> list[GenerationRequest]:
        """One engine request per choice; those of the first prompt first. `max_seconds` is the service's own limit.

        With `measure` the first one's answer is measured.
        """
        num_choices = self.params.num_choices
        limits = [limit for limit in (self.params.timeout, max_seconds) if limit is not None]
        return [
            GenerationRequest(
                request_id=f"{self.head.id}-{index}",
                prompt_token_ids=self.prompts[index // num_choices],
                sampling=self._sampling(index % num_choices),
                tenant=self.tenant.id,
                adapter=self.model.digest,
                priority=self.params.priority or 0,
                timeout_seconds=min(limits, default=None),
                measure=measure and index == 0,
                asked_by=asked,
            )
            for index in range(len(self.prompts) * num_choices)
        ]

    def _sampling(self, choice: int) -> SamplingParams:
        params = self.params
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=_or(params.temperature, 1.0),
            top_p=_or(params.top_p, 1.0),
            top_k=params.top_k or 0,
            min_p=params.min_p or 0.0,
            presence_penalty=params.presence_penalty or 0.0,
            frequency_penalty=params.frequency_penalty or 0.0,
            repetition_penalty=_or(params.repetition_penalty, 1.0),
            seed=None if params.seed is None else (params.seed + choice) % NUM_SEEDS,
            stop=tuple(params.stop or ()),
            ignore_eos=bool(params.ignore_eos),
            logprobs=self.logprobs,
            logit_bias=tuple((params.logit_bias or {}).items()),
            grammar=self.grammar,
        )


async def answer(request: Request, services: Services, ask: Ask, shape: AnswerShape) -> Response:
    """Generate, and answer as the client asked: at once or as a stream.

    Sets `request.state.outcome` for the metrics where the status alone does not tell.
    """
    origin = origin_of(request, ask.operation)
    tap = services.drift.tap(ask.tenant.id, ask.model, ask.turn, ask.prompts[0]) if services.drift else None
    limit = services.settings.request_timeout_seconds
    requests = ask.requests(limit, measure=tap is not None, asked=asked_by(request))
    if request.state.trace is not None:
        request.state.trace.asked(ask.operation, ask.params.model, ask.model.id, ask.head.id, requests)
    generation = Generation(services.engine, services.metrics, requests, origin)
    watch = AnswerWatch(services.rollout, ask.head.id, ask.tenant.id, ask.route, requests, ask.keepsake, tap)
    headers = watch.headers
    if ask.model.digest is not None:
        headers["x-rootstock-adapter"] = ask.model.digest
    try:
        await unless_disconnected(request, generation.start())
        watch.started()
        if ask.params.stream:
            request.state.outcome = "aborted"  # until the last event is sent
            events = _events(request, generation, ask, shape, watch)
            return EventStream(events, partial(_release, generation, watch), headers)
        body = await unless_disconnected(request, _body(generation, ask, shape, watch))
    except BaseException as error:
        watch.failed(error)
        await generation.aclose()
        raise
    return JSONResponse(body, headers=headers)


async def _release(generation: Generation, watch: AnswerWatch) -> None:
    watch.abandoned()
    await generation.aclose()


async def _body(generation: Generation, ask: Ask, shape: AnswerShape, watch: AnswerWatch) -> dict[str, Any]:
    choices = [Choice() for _ in range(generation.num_choices)]
    count = _TokenCount(ask.params.num_choices)
    async for index, chunk in generation.chunks():
        if watch.is_watching:
            watch.add(index, chunk)
        choices[index].add(chunk)
        count.add(index, chunk)
    watch.finished()
    return shape.body(choices, count.usage())


async def _events(
    request: Request, generation: Generation, ask: Ask, shape: AnswerShape, watch: AnswerWatch
) -> AsyncIterator[bytes]:
    count = _TokenCount(ask.params.num_choices)
    outcome = "success"
    try:
        async for index, chunk in generation.chunks():
            if watch.is_watching:
                watch.add(index, chunk)
            count.add(index, chunk)
            if events := shape.chunk_events(index, chunk):
                yield events
        watch.finished()
        if ask.params.include_usage:
            yield shape.usage_event(count.usage())
    except (ServiceError, EngineError, AdapterError) as error:
        outcome = "error"
        watch.failed(error)
        yield event(wire_error(error).body)
    yield DONE
    request.state.outcome = outcome


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
