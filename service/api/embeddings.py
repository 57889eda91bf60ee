"""POST /v1/embeddings: texts or token lists become vectors of length one. Writes OpenAI's JSON; computes nothing."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from service.api.answer import fall_back
from service.api.auth import AccessDep
from service.api.generation import asked_by, origin_of, unless_disconnected
from service.api.json_body import JsonRoute
from service.api.meter import Meter
from service.api.schemas import EmbeddingsRequest
from service.api.services import Services, ServicesDep
from service.engine.errors import AdapterUnavailableError, EngineError
from service.engine.sequence import AskedBy, GenerationRequest, SamplingParams
from service.errors import InvalidRequestError
from service.metrics import Origin
from service.routing import ResolvedModel, Route
from service.tenants import Tenant
from service.usage_rows import Tokens

MAX_TOTAL_TOKENS = 300_000
"""Of all inputs of one request; OpenAI's."""

SEATS_SHARE, TOKENS_SHARE = 4, 2
"""However many inputs it brings, one request takes a quarter of the engine's seats and half of the tokens of a step."""

Vector = NDArray[np.float32]

router = APIRouter(route_class=JsonRoute, tags=["embeddings"])


@dataclass(frozen=True)
class _Ask:
    """A request, understood."""

    id: str
    model: ResolvedModel
    requests: Sequence[GenerationRequest]

    @property
    def num_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)


@router.post("/v1/embeddings")
async def create_embeddings(
    body: EmbeddingsRequest, request: Request, access: AccessDep, services: ServicesDep
) -> Response:
    ask = await run_in_threadpool(_understand, body, access.tenant, services, asked_by(request))
    origin = origin_of(request, "embeddings")
    if request.state.trace is not None:
        request.state.trace.asked("embeddings", body.model, ask.model.id, ask.id, ask.requests)
    meter = Meter(services, access, ask.id, ask.model.id)
    meter.reserve(ask.num_tokens, ask.num_tokens)
    try:
        vectors = await unless_disconnected(request, _embed(ask.requests, services, origin))
    except BaseException as error:
        meter.failed(error)  # nothing was counted: an answer that nobody got costs nothing
        if isinstance(error, AdapterUnavailableError):
            alias = None if body.model == ask.model.id else body.model
            await fall_back(services, access.tenant.id, Route(ask.model, alias), error)
        raise
    await meter.book(Tokens(requests=1, prompt_tokens=ask.num_tokens))
    return await run_in_threadpool(_answer, body, ask, vectors)


def _understand(body: EmbeddingsRequest, tenant: Tenant, services: Services, asked: AskedBy) -> _Ask:
    model = services.registry.resolve(tenant.id, body.model)
    size = services.engine.embedding_size
    if size is not None and (body.dimensions or 1) > size:
        raise InvalidRequestError(f"This model's embeddings have {size} dimensions.", param="dimensions")
    name = f"embd-{uuid.uuid4().hex}"
    sampling = SamplingParams()
    ask = _Ask(
        name,
        model,
        [
            GenerationRequest(
                f"{name}-{index}",
                _tokens(body, index, services),
                sampling,
                tenant.id,
                model.digest,
                pooling=True,
                asked_by=asked,
            )
            for index in range(len(body.inputs))
        ],
    )
    if ask.num_tokens > MAX_TOTAL_TOKENS:
        raise InvalidRequestError(
            f"All inputs together may have {MAX_TOTAL_TOKENS} tokens; these have {ask.num_tokens}.", param="input"
        )
    return ask


def _tokens(body: EmbeddingsRequest, index: int, services: Services) -> tuple[int, ...]:
    base, one, param = services.base, body.inputs[index], body.name_of(index)
    tokens = base.tokenizer.encode(one) if isinstance(one, str) else one
    if not tokens:
        raise InvalidRequestError("An input may not be empty.", param=param)
    if not 0 <= min(tokens) <= max(tokens) < base.vocab_size:
        raise InvalidRequestError(f"Tokens must lie in 0..{base.vocab_size - 1}.", param=param)
    if len(tokens) > base.max_model_len:
        raise InvalidRequestError(
            f"This model's maximum context length is {base.max_model_len} tokens; this input has {len(tokens)}.",
            param=param,
            code="context_length_exceeded",
        )
    return tuple(tokens)


async def _embed(requests: Sequence[GenerationRequest], services: Services, origin: Origin) -> list[Vector]:
    """All vectors, a few requests at a time. The first failure aborts the rest."""
    settings = services.settings
    seats, tokens = settings.max_num_seqs // SEATS_SHARE, settings.max_num_batched_tokens // TOKENS_SHARE
    tasks: list[asyncio.Task[Vector]] = []
    running: dict[asyncio.Task[Vector], int] = {}  # with the tokens that each takes of a step
    try:
        for request in requests:
            wanted = min(len(request.prompt_token_ids), settings.prefill_chunk)
            while running and (len(running) >= seats or sum(running.values()) + wanted > tokens):
                await _free_some(running)
            task = asyncio.create_task(_one(request, services, origin))
            tasks.append(task)
            running[task] = wanted
        while running:
            await _free_some(running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [task.result() for task in tasks]


async def _free_some(running: dict[asyncio.Task[Vector], int]) -> None:
    """Wait for one of them at least. Raises what it failed with."""
    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    for task in done:
        del running[task]


async def _one(request: GenerationRequest, services: Services, origin: Origin) -> Vector:
    services.metrics.sequence_submitted(request.request_id, origin)
    try:
        return await services.engine.embed(request)
    except EngineError:
        services.metrics.sequence_refused(request.request_id)
        raise


def _answer(body: EmbeddingsRequest, ask: _Ask, vectors: Sequence[Vector]) -> Response:
    data = [
        {"object": "embedding", "index": index, "embedding": _written(shortened(vector, body.dimensions), body)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": ask.num_tokens, "total_tokens": ask.num_tokens}
    headers = {} if ask.model.digest is None else {"x-rootstock-adapter": ask.model.digest}
    return JSONResponse({"object": "list", "data": data, "model": ask.model.id, "usage": usage}, headers=headers)


def shortened(vector: Vector, dimensions: int | None) -> Vector:
    """The first `dimensions` numbers, at length one again."""
    if dimensions is None or dimensions >= len(vector):
        return vector
    first = vector[:dimensions]
    length = float(np.linalg.norm(first.astype(np.float64)))
    return (first / max(length, 1e-12)).astype(np.float32)


def _written(vector: Vector, body: EmbeddingsRequest) -> str | list[float]:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
