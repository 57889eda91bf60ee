"""POST /v1/completions, the legacy endpoint: prompts as text or as tokens, several at once. Writes its JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from service.api.answer import Ask, Choice, Head, answer
from service.api.auth import AccessDep
from service.api.description import answers
from service.api.end_user import end_user
from service.api.json_body import JsonRoute
from service.api.keepsake import keepsake
from service.api.logprobs import legacy_logprobs
from service.api.meter import Usage
from service.api.schemas import CompletionRequest
from service.api.services import Services, ServicesDep
from service.api.sse import to_json
from service.api.structured import format_source
from service.drift_intake import Turn
from service.engine.grammar_source import GrammarSource
from service.engine.sequence import OutputChunk
from service.errors import InvalidRequestError
from service.tenants import Tenant

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, of this endpoint only."""

MAX_SEQUENCES = 256
"""Prompts times choices of one request."""

router = APIRouter(route_class=JsonRoute, tags=["completions"])


@router.post("/v1/completions", responses=answers("application/json", "text/event-stream"))
async def create_completion(
    body: CompletionRequest, request: Request, access: AccessDep, services: ServicesDep
) -> Response:
    who = end_user(request, body)
    ask, source = await run_in_threadpool(_understand, body, who, access.tenant, services)
    ask = replace(ask, turn=Turn(who.name, expects_json=body.expects_json))
    if source is not None:
        ask = replace(ask, grammar=await services.grammars.of(access.tenant.id).compile(source))
    return await answer(
        request,
        services,
        access,
        ask,
        CompletionShape(ask.head, body.include_usage, tells_logprobs=ask.logprobs is not None),
    )


def _understand(
    body: CompletionRequest, who: Callable[[], str], tenant: Tenant, services: Services
) -> tuple[Ask, GrammarSource | None]:
    route = services.registry.route(tenant.id, body.model, who)
    if len(body.prompt) * body.num_choices > MAX_SEQUENCES:
        raise InvalidRequestError(f"Prompts times 'n' may not exceed {MAX_SEQUENCES}.", param="prompt")
    ask = Ask(
        operation="completions",
        head=Head.new("cmpl", route.model, services),
        tenant=tenant,
        route=route,
        params=body,
        prompts=[_tokens(prompt, services) for prompt in body.prompt],
        max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        keepsake=keepsake(services.rollout, tenant.id, body),
    )
    ask.check_lengths(services.base.max_model_len, "prompt")
    return ask, format_source(body.response_format, body.structured_outputs)


def _tokens(prompt: str | list[int], services: Services) -> tuple[int, ...]:
    base = services.base
    tokens = base.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not tokens:
        raise InvalidRequestError("A prompt may not be empty.", param="prompt")
    if not 0 <= min(tokens) <= max(tokens) < base.vocab_size:
        raise InvalidRequestError(f"Tokens must lie in 0..{base.vocab_size - 1}.", param="prompt")
    return tuple(tokens)


class CompletionShape:
    """Text completions; a stream's chunks and its end are of the same object type."""

    def __init__(self, head: Head, include_usage: bool, *, tells_logprobs: bool) -> None:
        self._head = head
        self._tells_logprobs = tells_logprobs
        self._offsets: Counter[int] = Counter()
        start = to_json(self._fields())[:-1]
        self._before = f'data: {start},"choices":['
        self._after = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def body(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        written = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": legacy_logprobs(choice.logprobs) if self._tells_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._fields(), "choices": written, "usage": usage}

    def chunk_events(self, index: int, chunk: OutputChunk) -> bytes:
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return b""
        logprobs, finish_reason = "null", "null"
        if chunk.logprobs:
            logprobs = to_json(legacy_logprobs(chunk.logprobs, self._offsets[index]))
            self._offsets[index] += sum(len(token.token) for token in chunk.logprobs)
        if chunk.finish_reason is not None:
            finish_reason = f'"{chunk.finish_reason}"'
        choice = (
            f'{{"index":{index},"text":{to_json(chunk.text)},"logprobs":{logprobs},"finish_reason":{finish_reason}}}'
        )
        return f"{self._before}{choice}{self._after}".encode()

    def usage_event(self, usage: Usage) -> bytes:
        return f'{self._before}],"usage":{to_json(usage)}}}\n\n'.encode()

    def _fields(self) -> dict[str, Any]:
        head = self._head
        return {
            "id": head.id,
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.system_fingerprint,
        }
