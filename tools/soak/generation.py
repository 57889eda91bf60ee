"""What tenants ask models: whole, streamed, left in the middle, with every form of answer. Checks what comes back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any, cast

import httpx
import openai

from tools.soak.tenant import Tenant

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPTS = [f"{verb} {noun}" for verb in ("name", "sort", "count") for noun in ("trees", "roots", "7 pears", "grafts €")]
MAX_PROMPT_TOKENS = 400
"""No prompt of ours is longer."""
SCHEMA = {
    "type": "object",
    "properties": {"sort": {"enum": ["apple", "pear"]}, "ripe": {"type": "boolean"}},
    "required": ["sort", "ripe"],
    "additionalProperties": False,
}
ANSWER_KEYS = {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}


async def chat(tenant: Tenant) -> None:
    """Greedy, so that whoever asks the same adapter the same gets the same."""
    prompt = tenant.rng.choice(PROMPTS)
    answer = await _ask(tenant, "chat", CHAT, _messages(prompt), max_tokens=12, temperature=0)
    if answer is not None:
        _greedy(tenant, answer, prompt, answer.body["choices"][0]["message"]["content"])


async def chat_with_choices(tenant: Tenant) -> None:
    n = tenant.rng.randint(2, 4)
    answer = await _ask(tenant, "chat n>1", CHAT, _messages("choose"), n=n, max_tokens=6, seed=tenant.rng.randint(0, 9))
    if answer is not None:
        right = [choice["index"] for choice in answer.body["choices"]] == list(range(n))
        tenant.shared.caller.ledger.expect(right, "as many choices as asked for", answer.body)


async def chat_with_schema(tenant: Tenant) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": SCHEMA, "strict": True}}
    answer = await _ask(tenant, "chat json schema", CHAT, _messages("fruit?"), response_format=form, max_tokens=64)
    if answer is None:
        return
    choice = answer.body["choices"][0]
    if choice["finish_reason"] == "stop":
        value = json.loads(choice["message"]["content"])
        right = value.keys() == SCHEMA["properties"].keys() and value["sort"] in ("apple", "pear")  # type: ignore[attr-defined]
        tenant.shared.caller.ledger.expect(right, "an answer keeps to its schema", value)


async def chat_with_logprobs(tenant: Tenant) -> None:
    answer = await _ask(
        tenant, "chat logprobs", CHAT, _messages("how sure?"), logprobs=True, top_logprobs=3, max_tokens=5
    )
    if answer is None:
        return
    choice = answer.body["choices"][0]
    content, stopped = choice["logprobs"]["content"], choice["finish_reason"] == "stop"
    unseen = answer.body["usage"]["completion_tokens"] - len(content)
    right = unseen == 0 or (unseen == 1 and stopped)  # the end-of-turn token is counted, not shown
    right = right and all(token["logprob"] <= 1e-6 and len(token["top_logprobs"]) == 3 for token in content)
    tenant.shared.caller.ledger.expect(right, "a log-probability for every token", content)


async def completion(tenant: Tenant) -> None:
    prompts = tenant.rng.sample(PROMPTS, tenant.rng.randint(1, 3))
    answer = await _ask(tenant, "completion", COMPLETIONS, {"prompt": prompts}, max_tokens=8, temperature=0.7)
    if answer is not None:
        right = len(answer.body["choices"]) == len(prompts)
        tenant.shared.caller.ledger.expect(right, "an answer for each prompt", answer.body)


async def chat_stream(tenant: Tenant) -> None:
    prompt = tenant.rng.choice(PROMPTS)
    answer = await _stream(tenant, "chat stream", CHAT, _messages(prompt), max_tokens=12, temperature=0)
    if answer is not None:
        _greedy(tenant, answer, prompt, answer.text)


async def completion_stream(tenant: Tenant) -> None:
    await _stream(tenant, "completion stream", COMPLETIONS, {"prompt": tenant.rng.choice(PROMPTS)}, max_tokens=16)


async def left_stream(tenant: Tenant) -> None:
    """A client that goes away in the middle."""
    await _stream(
        tenant, "left stream", CHAT, _messages("a long story"), leave_after=2, max_tokens=200, ignore_eos=True
    )


async def left_answer(tenant: Tenant) -> None:
    """One that goes away before anything came."""
    account = tenant.account
    model, _ = tenant.some_model()
    body = {"model": model, **_messages("another long story"), "max_tokens": 200, "ignore_eos": True, "n": 2}
    caller, start = tenant.shared.caller, time.monotonic()
    tenant.shared.books.cut_short(account, MAX_PROMPT_TOKENS, 400)
    try:
        async with httpx.AsyncClient(base_url=caller.url, timeout=0.3, trust_env=False) as http:
            response = await http.post(CHAT, json=body, headers=_authorized(tenant))
        await caller.accept("left answer", start, response)
    except httpx.ReadTimeout:
        caller.ledger.count("left answer", "left")
    except httpx.TransportError as error:
        await caller.broken("left answer", start, repr(error))


async def embed(tenant: Tenant) -> None:
    account = tenant.account
    inputs = tenant.rng.sample(PROMPTS, tenant.rng.randint(1, 4))
    model, _ = tenant.some_model()
    shared = tenant.shared
    body = await shared.caller.json(
        "embeddings", "POST", "/v1/embeddings", tenant.key, json={"model": model, "input": inputs}
    )
    if body is None:
        shared.books.cut_short(account, MAX_PROMPT_TOKENS, 0)
        return
    shared.books.told(account, body["usage"])
    vectors = [item["embedding"] for item in body["data"]]
    right = len(vectors) == len(inputs) and all(abs(math.hypot(*vector) - 1) < 1e-3 for vector in vectors)
    shared.caller.ledger.expect(right, "embeddings of length one", body["usage"])


async def official_client(tenant: Tenant) -> None:
    """OpenAI's own, which checks every answer against its types."""
    account = tenant.account
    shared, start = tenant.shared, time.monotonic()
    model, _ = tenant.some_model()
    operation, streams = "openai client", tenant.rng.random() < 0.5
    client = openai.AsyncOpenAI(
        base_url=f"{shared.caller.url}/v1",
        api_key=tenant.key,
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        _strict_response_validation=True,
    )
    usage: Any = None
    try:
        async with client:
            usage = await _usage_told(client, model, streams=streams)
    except openai.APIStatusError as error:
        await shared.caller.accept(operation, start, cast(httpx.Response, error.response))  # httpx2's, which is alike
    except (openai.APIError, httpx.TransportError) as error:
        await shared.caller.broken(operation, start, repr(error))
    if usage is None:
        shared.books.cut_short(account, MAX_PROMPT_TOKENS, 8)
        return
    shared.caller.ledger.count(operation, "200")
    shared.caller.took(operation, start)
    shared.books.told(account, usage.model_dump())


async def _usage_told(client: openai.AsyncOpenAI, model: str, *, streams: bool) -> Any:
    asked: Any = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    if not streams:
        return (await client.chat.completions.create(**asked)).usage
    usage = None
    async for chunk in await client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
    return usage


async def over_the_limits(tenant: Tenant) -> None:
    """Requests that are to be refused, each with its own status."""
    rng, caller = tenant.rng, tenant.shared.caller
    model, _ = tenant.some_model()
    right = {"model": model, **_messages("hello"), "max_tokens": 1}
    wrong: list[tuple[str, int, dict[str, Any]]] = [
        ("too many tokens", 400, {"json": {**right, "max_tokens": 4000}}),
        ("unknown field", 400, {"json": {**right, "colour": "red"}}),
        ("unknown model", 404, {"json": {**right, "model": "ft:nobody"}}),
        ("no JSON", 400, {"content": b'{"model": ', "headers": {"content-type": "application/json"}}),
        ("huge body", 413, {"content": b" " * (9 << 20), "headers": {"content-type": "application/json"}}),
        ("no key", 401, {"json": right, "headers": {"authorization": "Bearer sk-nobody"}}),
        ("bad grammar", 400, {"json": {**right, "structured_outputs": {"regex": "(((("}}}),
    ]
    name, status, options = rng.choice(wrong)
    await caller.send(f"refused: {name}", "POST", CHAT, tenant.key, expect=(status,), **options)


class _Answer:
    """What came: the body of a whole answer, or the text of a stream."""

    def __init__(self, headers: httpx.Headers, body: Mapping[str, Any], text: str = "") -> None:
        self.digest = headers.get("x-rootstock-adapter", "base")
        self.body = body
        self.text = text


async def _ask(tenant: Tenant, operation: str, path: str, prompt: dict[str, Any], **fields: Any) -> _Answer | None:
    account = tenant.account
    shared = tenant.shared
    model, may_answer = tenant.some_model()
    most = fields["max_tokens"] * fields.get("n", 1) * _num_prompts(prompt)
    sent = {"model": model, **prompt, **fields}
    response = await shared.caller.send(operation, "POST", path, tenant.key, json=sent)
    if response is None:
        shared.books.cut_short(account, MAX_PROMPT_TOKENS, most)
        return None
    body = response.json()
    shared.books.told(account, body["usage"])
    tenant.remember(body["id"])
    ledger = shared.caller.ledger
    ledger.expect(body.keys() == ANSWER_KEYS, "an answer has OpenAI's fields", body)
    ledger.expect(
        not may_answer or body["model"] in may_answer, "the model that was asked answers", (body["model"], may_answer)
    )
    usage = body["usage"]
    right = usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    ledger.expect(right and 0 < usage["completion_tokens"] <= most, "usage adds up", usage)
    return _Answer(response.headers, body)


async def _stream(
    tenant: Tenant, operation: str, path: str, prompt: dict[str, Any], leave_after: int | None = None, **fields: Any
) -> _Answer | None:
    account = tenant.account
    shared, start = tenant.shared, time.monotonic()
    model, may_answer = tenant.some_model()
    body = {"model": model, **prompt, **fields, "stream": True, "stream_options": {"include_usage": True}}
    events: list[dict[str, Any]] = []
    first, done = None, False
    try:
        async with shared.caller.http.stream("POST", path, json=body, headers=_authorized(tenant)) as response:
            if response.status_code != 200:
                await response.aread()
                await shared.caller.accept(operation, start, response)
                shared.books.cut_short(account, MAX_PROMPT_TOKENS, fields["max_tokens"])
                return None
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    events.append(json.loads(line.removeprefix("data: ")))
                    if first is None and _text_of(events[-1]):
                        first = time.monotonic() - start
                    if leave_after is not None and len(events) > leave_after:
                        break
    except httpx.TransportError as error:
        events.append({"error": repr(error)})
    if leave_after is not None and not done and events and "error" not in events[-1]:
        shared.caller.ledger.count(operation, "left")
        shared.books.cut_short(account, MAX_PROMPT_TOKENS, fields["max_tokens"])
        return None
    if not done or any("error" in event for event in events):
        await shared.caller.broken(operation, start, json.dumps(events[-1:]))
        shared.books.cut_short(account, MAX_PROMPT_TOKENS, fields["max_tokens"])
        return None
    shared.caller.ledger.count(operation, "200")
    shared.caller.took(operation, start, first)
    shared.books.told(account, events[-1]["usage"])
    tenant.remember(events[0]["id"])
    ledger = shared.caller.ledger
    ledger.expect(len({event["id"] for event in events}) == 1, "a stream is of one answer", events[:2])
    right = not may_answer or events[0]["model"] in may_answer
    ledger.expect(right, "the model that was asked answers", (events[0]["model"], may_answer))
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    ledger.expect(len(reasons) == 1, "a stream ends once", reasons)
    return _Answer(response.headers, events[-1], "".join(map(_text_of, events)))


def _greedy(tenant: Tenant, answer: _Answer, prompt: str, text: str) -> None:
    known = tenant.shared.answers.setdefault((answer.digest, "chat", prompt), text)
    tenant.shared.caller.ledger.expect(
        known == text, "the same greedy answer, streamed or not, before and after kills", (answer.digest, known, text)
    )


def _text_of(event: Mapping[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return choices[0].get("text") or choices[0].get("delta", {}).get("content") or ""


def _messages(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}]}


def _num_prompts(prompt: Mapping[str, Any]) -> int:
    return len(prompt.get("prompt", [None]))


def _authorized(tenant: Tenant) -> dict[str, str]:
    return {"authorization": f"Bearer {tenant.key}"}
