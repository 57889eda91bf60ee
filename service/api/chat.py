"""POST /v1/chat/completions. Writes OpenAI's chat JSON; what an answer is, `service.api.answer` knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from service.api.answer import Ask, Choice, Head, Usage, answer
from service.api.auth import TenantDep
from service.api.logprobs import chat_logprobs
from service.api.schemas import ChatRequest
from service.api.services import Services, ServicesDep
from service.api.sse import to_json
from service.api.structured import format_source
from service.engine.grammar_source import GrammarSource
from service.engine.sequence import OutputChunk
from service.tenants import Tenant

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, tenant: TenantDep, services: ServicesDep
) -> Response:
    ask, source = await run_in_threadpool(_understand, body, tenant, services)
    if source is not None:
        ask = replace(ask, grammar=await services.grammars.compile(source))
    return await answer(request, services, ask, ChatShape(ask.head, body.include_usage))


def _understand(body: ChatRequest, tenant: Tenant, services: Services) -> tuple[Ask, GrammarSource | None]:
    model = services.registry.resolve(tenant.id, body.model)
    ask = Ask(
        operation="chat",
        head=Head.new("chatcmpl", model, services),
        tenant=tenant,
        model=model,
        params=body,
        prompts=[tuple(_render(body, services))],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    ask.check_lengths(services.base.max_model_len, "messages")
    return ask, format_source(body.response_format, body.structured_outputs)


def _render(body: ChatRequest, services: Services) -> Sequence[int]:
    """The prompt's tokens. `developer` is OpenAI's newer name for `system`; templates know the older one."""
    messages = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in body.messages
    ]
    return services.base.render_chat(messages)


class ChatShape:
    """Chat completions. Chunk events are put together from strings: there is one for every token of everybody."""

    def __init__(self, head: Head, include_usage: bool) -> None:
        self._head = head
        self._started: set[int] = set()
        start = to_json(self._fields("chat.completion.chunk"))[:-1]
        self._before = f'data: {start},"choices":['
        self._after = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def body(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        written = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(choice.logprobs) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._fields("chat.completion"), "choices": written, "usage": usage}

    def chunk_events(self, index: int, chunk: OutputChunk) -> bytes:
        events = ""
        if index not in self._started:
            self._started.add(index)
            events += self._event(index, '{"role":"assistant","content":"","refusal":null}')
        if chunk.text or chunk.logprobs:
            logprobs = to_json(chat_logprobs(chunk.logprobs)) if chunk.logprobs else "null"
            events += self._event(index, f'{{"content":{to_json(chunk.text)}}}', logprobs)
        if chunk.finish_reason is not None:
            events += self._event(index, "{}", finish_reason=f'"{chunk.finish_reason}"')
        return events.encode()

    def usage_event(self, usage: Usage) -> bytes:
        return f'{self._before}],"usage":{to_json(usage)}}}\n\n'.encode()

    def _event(self, index: int, delta: str, logprobs: str = "null", finish_reason: str = "null") -> str:
        choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}'
        return self._before + choice + self._after

    def _fields(self, kind: str) -> dict[str, Any]:
        head = self._head
        return {
            "id": head.id,
            "object": kind,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.system_fingerprint,
        }
