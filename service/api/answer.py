"""From a generation request to its HTTP answer, one body or a stream: what chat and completions share.

Each of them brings its prompts and an `AnswerShape`. Knows nothing of either's JSON.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from adapters.errors import AdapterError
from service.api.answer_watch import AnswerWatch
from service.api.generation import Generation, asked_by, origin_of, unless_disconnected
from service.api.keepsake import Keepsake
from service.api.meter import Meter, Usage
from service.api.schemas import GenerationParams
from service.api.services import Services
from service.api.sse import DONE, EventStream, event
from service.drift_intake import Turn
from service.engine.errors import AdapterUnavailableError, EngineError
from service.engine.grammar import AnyGrammar
from service.engine.sequence import (
    AskedBy,
    FinishReason,
    GenerationRequest,
    OutputChunk,
    SamplingParams,
    TokenLogprob,
)
from service.errors import InvalidRequestError, ServiceError, UnavailableError, wire_error
from service.routing import ResolvedModel, Route
from service.tenants import Access, Tenant

NUM_SEEDS = 2**63
"""The engine's seeds lie in 0 … 2**63 - 1; those of clients are 64-bit and signed."""


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

    def num_tokens(self, max_model_len: int) -> tuple[int, int]:
        """That it takes in any case, as far as it says, and at most."""
        given = sum(len(prompt) for prompt in self.prompts)
        num_choices = self.params.num_choices
        if self.max_tokens is not None:
            whole = given + self.max_tokens * num_choices * len(self.prompts)
            return whole, whole
        return given, given + sum(max_model_len - len(prompt) for prompt in self.prompts) * num_choices

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


async def answer(request: Request, services: Services, access: Access, ask: Ask, shape: AnswerShape) -> Response:
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
    meter = Meter(services, access, ask.head.id, ask.model.id, ask.params.num_choices)
    meter.reserve(*ask.num_tokens(services.base.max_model_len))
    try:
        await unless_disconnected(request, generation.start())
        watch.started()
        if ask.params.stream:
            request.state.outcome = "aborted"  # until the last event is sent
            events = _events(request, generation, ask, shape, watch, meter)
            return EventStream(events, partial(_release, generation, watch, meter), headers)
        body = await unless_disconnected(request, _body(generation, shape, watch, meter))
    except BaseException as error:
        watch.failed(error)
        meter.failed(error)
        await generation.aclose()
        if isinstance(error, AdapterUnavailableError):
            await fall_back(services, ask.tenant.id, ask.route, error)
        raise
    return JSONResponse(body, headers=headers)


async def fall_back(services: Services, tenant_id: str, route: Route, error: AdapterUnavailableError) -> None:
    """Lead aliases away from an adapter that is damaged or lost. Raises UnavailableError when the request's own alias
    has moved: asked again, it answers."""
    if services.fallback is None or error.code not in ("adapter_damaged", "adapter_not_found"):
        return
    moved = await run_in_threadpool(services.fallback.away_from, error.digest)
    mine = [fallen for fallen in moved if fallen.tenant_id == tenant_id and fallen.alias == route.alias]
    if mine:
        raise UnavailableError(
            f"The model behind '{route.alias}' is damaged; the alias has gone back to an earlier one: ask again.",
            code="adapter_damaged",
        ) from error


async def _release(generation: Generation, watch: AnswerWatch, meter: Meter) -> None:
    watch.abandoned()
    meter.abandoned()
    await generation.aclose()


async def _body(generation: Generation, shape: AnswerShape, watch: AnswerWatch, meter: Meter) -> dict[str, Any]:
    choices = [Choice() for _ in range(generation.num_choices)]
    async for index, chunk in generation.chunks():
        if watch.is_watching:
            watch.add(index, chunk)
        choices[index].add(chunk)
        meter.add(index, chunk)
    watch.finished()
    return shape.body(choices, await meter.finished())


async def _events(
    request: Request, generation: Generation, ask: Ask, shape: AnswerShape, watch: AnswerWatch, meter: Meter
) -> AsyncIterator[bytes]:
    outcome = "success"
    try:
        async for index, chunk in generation.chunks():
            if watch.is_watching:
                watch.add(index, chunk)
            meter.add(index, chunk)
            if events := shape.chunk_events(index, chunk):
                yield events
        watch.finished()
        usage = await meter.finished()
        if ask.params.include_usage:
            yield shape.usage_event(usage)
    except (ServiceError, EngineError, AdapterError) as error:
        outcome = "error"
        watch.failed(error)
        meter.failed(error)
        yield event(wire_error(error).body)
    yield DONE
    request.state.outcome = outcome


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
