"""POST /v1/chat/completions. Writes OpenAI's chat JSON; what an answer is, `service.api.answer` knows."""

from __future__ import annotations

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
from service.api.logprobs import chat_logprobs
from service.api.meter import Usage
from service.api.schemas import ChatRequest
from service.api.services import Services, ServicesDep
from service.api.sse import to_json
from service.api.structured import format_source
from service.api.tool_grammar import tool_grammar
from service.api.tool_parser import CallSyntax, ToolCallParser, read_whole, wire_delta
from service.drift_intake import Turn
from service.engine.sequence import FinishReason, OutputChunk
from service.tenants import Tenant

router = APIRouter(route_class=JsonRoute, tags=["chat"])


@router.post("/v1/chat/completions", responses=answers("application/json", "text/event-stream"))
async def create_chat_completion(
    body: ChatRequest, request: Request, access: AccessDep, services: ServicesDep
) -> Response:
    who = end_user(request, body)
    ask = await run_in_threadpool(_understand, body, who, access.tenant, services)
    calls: CallSyntax | None = None
    if body.may_call:
        grammar, calls = await tool_grammar(body, services.tool_format, services.grammars.of(access.tenant.id))
        ask = replace(ask, grammar=grammar)
    elif source := await run_in_threadpool(format_source, body.response_format, body.structured_outputs):
        ask = replace(ask, grammar=await services.grammars.of(access.tenant.id).compile(source))
    if not any(message.role == "assistant" for message in body.messages):
        ask = replace(ask, turn=Turn(who.name, expects_json=body.expects_json))
    return await answer(
        request,
        services,
        access,
        ask,
        ChatShape(ask.head, body.include_usage, calls, tells_logprobs=ask.logprobs is not None),
    )


def _understand(body: ChatRequest, who: Callable[[], str], tenant: Tenant, services: Services) -> Ask:
    route = services.registry.route(tenant.id, body.model, who)
    ask = Ask(
        operation="chat",
        head=Head.new("chatcmpl", route.model, services),
        tenant=tenant,
        route=route,
        params=body,
        prompts=[tuple(_render(body, services))],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        keepsake=keepsake(services.rollout, tenant.id, body),
    )
    ask.check_lengths(services.base.max_model_len, "messages")
    return ask


def _render(body: ChatRequest, services: Services) -> Sequence[int]:
    """The prompt's tokens. Where no tool may be called, the model is not told of any."""
    tools = (body.tools or ()) if body.may_call else ()
    return services.base.render_chat(*services.tool_format.prompt(body.messages, tools))


class ChatShape:
    """Chat completions. Chunk events are put together from strings: there is one for every token of everybody."""

    def __init__(
        self, head: Head, include_usage: bool, calls: CallSyntax | None = None, *, tells_logprobs: bool = False
    ) -> None:
        self._head = head
        self._calls = calls
        self._tells_logprobs = tells_logprobs
        self._parsers: dict[int, ToolCallParser] = {}
        self._started: set[int] = set()
        start = to_json(self._fields("chat.completion.chunk"))[:-1]
        self._before = f'data: {start},"choices":['
        self._after = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def body(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        written = [
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(choice.logprobs) if self._tells_logprobs else None,
                "finish_reason": reason,
            }
            for index, choice in enumerate(choices)
            for message, reason in [self._message(choice)]
        ]
        return {**self._fields("chat.completion"), "choices": written, "usage": usage}

    def _message(self, choice: Choice) -> tuple[dict[str, Any], str | None]:
        """The message and its finish reason."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._calls is None:
            return message, choice.finish_reason
        content, calls = read_whole(self._calls.parser(), choice.text, choice.finish_reason is FinishReason.LENGTH)
        if not calls:
            return {**message, "content": content}, choice.finish_reason
        return {**message, "content": content or None, "tool_calls": calls}, _reason(choice.finish_reason, len(calls))

    def chunk_events(self, index: int, chunk: OutputChunk) -> bytes:
        if self._calls is not None:
            return self._events_with_calls(index, chunk, self._calls)
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

    def _events_with_calls(self, index: int, chunk: OutputChunk, calls: CallSyntax) -> bytes:
        """The log-probabilities of a chunk go with the first event that it brings."""
        events = ""
        if index not in self._parsers:
            self._parsers[index] = calls.parser()
            events += self._event(index, '{"role":"assistant","content":null,"refusal":null}')
        parser, reason = self._parsers[index], chunk.finish_reason
        deltas = [to_json(wire_delta(delta)) for delta in parser.feed(chunk.text)]
        if reason is not None:
            deltas += [to_json(wire_delta(delta)) for delta in parser.finish(reason is FinishReason.LENGTH)]
        logprobs = to_json(chat_logprobs(chunk.logprobs)) if chunk.logprobs else "null"
        for delta in deltas or (["{}"] if chunk.logprobs else []):
            events += self._event(index, delta, logprobs)
            logprobs = "null"
        if reason is not None:
            events += self._event(index, "{}", finish_reason=f'"{_reason(reason, parser.num_calls)}"')
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


def _reason(reason: FinishReason | None, num_calls: int) -> str | None:
    return "tool_calls" if num_calls and reason is FinishReason.STOP else reason
