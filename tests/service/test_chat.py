"""Chat completions through the official client over a real socket; only the engine is a fake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from service.engine.errors import EngineDeadError, QueueFullError
from tests.service.http_fixtures import Served, serve_fake

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
PROMPT = "system:Be brief.\nuser:Hello?\n"
TEXT = "Grüße, world!"


def test_an_answer_has_the_shape_the_official_client_insists_on(shared_service: Served) -> None:
    answer = shared_service.client().chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "tiny"
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 4)
    assert answer.usage.total_tokens == len(PROMPT) + 4
    assert answer.system_fingerprint == "fp_fingerprint-"


def test_a_stream_starts_with_the_role_and_ends_with_the_reason(shared_service: Served) -> None:
    chunks = list(shared_service.client().chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_usage_tells_how_much_of_the_prompt_was_cached(served: Served, stream: bool) -> None:
    served.engine.cached = {"0": 64}
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    answer = served.client().chat.completions.create(**asked)
    usage = list(answer)[-1].usage if stream else answer.usage
    assert usage.prompt_tokens_details.cached_tokens == 64


def test_a_stream_reports_usage_once_at_its_end_when_asked(shared_service: Served) -> None:
    chunks = list(
        shared_service.client().chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


def test_the_bytes_of_a_stream_are_events_of_one_line_closed_by_done(shared_service: Served) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    http = shared_service.http()
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    assert '"usage":null}' in events[0]


def test_parts_of_text_and_the_developer_role_reach_the_template_as_plain_system_text(served: Served) -> None:
    served.client().chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Hello?"},
        ],
    )
    assert "".join(map(chr, served.engine.requests[0].prompt_token_ids)) == PROMPT


def test_an_earlier_answer_can_be_sent_back_as_the_client_dumps_it(served: Served) -> None:
    client = served.client()
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    said: Any = answer.choices[0].message.model_dump()
    client.chat.completions.create(model="tiny", messages=[*MESSAGES, said, MESSAGES[1]])
    assert TEXT in "".join(map(chr, served.engine.requests[1].prompt_token_ids))


def test_every_sampling_parameter_reaches_the_engine(served: Served) -> None:
    served.client().chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        seed=11,
        stop=["x", "y"],
        logprobs=True,
        top_logprobs=3,
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "ignore_eos": True,
            "priority": -2,
            "timeout": 9,
        },
    )
    (request,) = served.engine.requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.9)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.25, -0.25, 1.2)
    assert (sampling.seed, sampling.stop, sampling.logprobs) == (11, ("x", "y"), 3)
    assert (sampling.top_k, sampling.min_p, sampling.ignore_eos) == (5, 0.1, True)
    assert (request.priority, request.tenant, request.adapter) == (-2, served.control.acme.id, None)
    assert request.timeout_seconds == 9


def test_without_parameters_sampling_is_openais_default(served: Served) -> None:
    served.client().chat.completions.create(model="tiny", messages=MESSAGES)
    sampling = served.engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (None, 1.0, 1.0, None)


def test_temperature_zero_stays_zero(served: Served) -> None:
    served.client().chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, top_p=0)
    sampling = served.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 0.0)


def test_n_choices_are_n_sequences_with_seeds_of_their_own(served: Served) -> None:
    answer = served.client().chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=2**63 - 1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {TEXT}
    assert sorted(request.sampling.seed or 0 for request in served.engine.requests) == [0, 1, 2**63 - 1]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 12)


def test_n_choices_stream_interleaved_and_each_one_ends(shared_service: Served) -> None:
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in shared_service.client().chat.completions.create(model="tiny", messages=MESSAGES, n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts == {0: TEXT, 1: TEXT} and reasons == {0: "stop", 1: "stop"}


def test_log_probabilities_carry_token_bytes_and_alternatives(shared_service: Served) -> None:
    answer = shared_service.client().chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    first = logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("Grüße", -0.5, list("Grüße".encode()))
    assert [other.token for other in first.top_logprobs] == ["Grüße", "other0"]


def test_an_answer_without_a_token_has_an_empty_list_of_log_probabilities(served: Served) -> None:
    """Broke: it was null, and who asked for a list could not read it."""
    served.engine.pieces = ()
    answer = served.client().chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True)
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content == []
    text = served.client().completions.create(model="tiny", prompt="hello", logprobs=1)
    assert text.choices[0].logprobs is not None and text.choices[0].logprobs.tokens == []
    assert served.client().chat.completions.create(model="tiny", messages=MESSAGES).choices[0].logprobs is None


def test_streamed_log_probabilities_add_up_to_the_whole(shared_service: Served) -> None:
    stream = shared_service.client().chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, stream=True
    )
    tokens = [
        token.token
        for chunk in stream
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert "".join(tokens) == TEXT


def test_max_tokens_and_stop_end_an_answer_with_their_reason(shared_service: Served) -> None:
    client = shared_service.client()
    short = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("Grüße,", "length")
    stopped = client.chat.completions.create(model="tiny", messages=MESSAGES, stop=" w")
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("Grüße,", "stop")


def test_an_adapter_answers_under_its_resolved_id_and_shows_its_digest(served: Served) -> None:
    model = served.control.publish(suffix="letters", digest="e" * 64)
    served.control.registry.aliases.set(served.control.acme.id, "letters", model)
    answer = served.client().chat.completions.with_raw_response.create(model="letters", messages=MESSAGES)
    assert answer.headers["x-rootstock-adapter"] == "e" * 64
    assert answer.parse().model == model
    assert served.engine.requests[0].adapter == "e" * 64


def test_the_base_answers_without_an_adapter_header(shared_service: Served) -> None:
    answer = shared_service.client().chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES)
    assert "x-rootstock-adapter" not in answer.headers


def test_somebody_elses_model_is_not_found(served: Served) -> None:
    model = served.control.publish(digest="e" * 64)
    with pytest.raises(openai.NotFoundError) as caught:
        served.client(served.control.zenith_key).chat.completions.create(model=model, messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert served.engine.requests == []


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused(shared_service: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        shared_service.client().chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=250)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert "256 tokens" in caught.value.message and "250 in the completion" in caught.value.message


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("response_format", {"type": "json_object"}, "response_format"),
        ("logit_bias", {"x": 5}, "logit_bias"),
        ("logit_bias", {"-1": 5}, "logit_bias"),
        ("logit_bias", {"1": 101}, "logit_bias[1]"),
        ("logit_bias", {"1": "5"}, "logit_bias[1]"),
        ("logit_bias", {str(token): 1 for token in range(301)}, "logit_bias"),
        ("logit_bias", [1], "logit_bias"),
        ("response_format", {"type": "xml"}, "response_format.type"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
        ("response_format", {"type": "text", "json_schema": {"name": "a"}}, "response_format.json_schema"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "a b"}},
            "response_format.json_schema.name",
        ),
        ("structured_outputs", {}, "structured_outputs"),
        ("structured_outputs", {"regex": "a", "choice": ["a"]}, "structured_outputs"),
        ("structured_outputs", {"json": "{"}, "structured_outputs.json"),
        ("structured_outputs", {"regex": "a", "whitespace_pattern": "b"}, "structured_outputs.whitespace_pattern"),
        ("store", True, "store"),
        ("service_tier", "flex", "service_tier"),
        ("temperature", 2.1, "temperature"),
        ("temperature", "0.5", "temperature"),
        ("top_p", -0.1, "top_p"),
        ("presence_penalty", 3, "presence_penalty"),
        ("n", 0, "n"),
        ("n", True, "n"),
        ("stop", ["a", "b", "c", "d", "e"], "stop"),
        ("stop", "", "stop"),
        ("seed", 2**63, "seed"),
        ("top_logprobs", 21, "top_logprobs"),
        ("top_logprobs", 2, "top_logprobs"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("max_tokens", 0, "max_tokens"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("best_of", 2, "best_of"),
        ("nonsense", 1, "nonsense"),
        ("messages", [], "messages"),
        ("messages", [{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ("messages", [{"role": "user", "content": None}], "messages[0].content"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ("messages", [{"role": "user", "content": "x", "name": "bob"}], "messages[0].name"),
    ],
)
def test_a_field_that_is_wrong_or_unsupported_is_named(
    shared_service: Served, field: str, value: object, param: str
) -> None:
    http = shared_service.http()
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and param in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "u-1", "metadata": {"run": "7"}, "store": False, "service_tier": "auto"},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"temperature": None, "n": None, "stop": None, "max_tokens": None, "stream": None, "logit_bias": None},
        {"stream": False, "safety_identifier": "s", "prompt_cache_key": "k"},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(shared_service: Served, harmless: dict[str, object]) -> None:
    http = shared_service.http()
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, **harmless})
    assert answer.status_code == 200, answer.text


def test_an_overloaded_engine_answers_429_and_when_to_come_back(served: Served) -> None:
    served.engine.refusal = QueueFullError("10 requests are waiting already", retry_after=7.2)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            served.client().chat.completions.create(model="tiny", messages=MESSAGES, stream=stream)
        assert (caught.value.status_code, caught.value.code) == (429, "engine_overloaded")
        assert caught.value.response.headers["retry-after"] == "8"


def test_a_refusal_of_one_of_many_choices_refuses_the_request(served: Served) -> None:
    served.engine.refusal = EngineDeadError("the service is shutting down")
    with pytest.raises(openai.InternalServerError) as caught:
        served.client().chat.completions.create(model="tiny", messages=MESSAGES, n=4)
    assert caught.value.status_code == 503


def test_an_engine_error_in_the_middle_is_a_500_or_an_event_of_the_stream(served: Served) -> None:
    served.engine.fails_after = 2
    with pytest.raises(openai.InternalServerError, match="the adapter is damaged"):
        served.client().chat.completions.create(model="tiny", messages=MESSAGES)
    received = []
    with pytest.raises(openai.APIError, match="the adapter is damaged"):
        for chunk in served.client().chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
            received.append(chunk.choices[0].delta.content)
    assert "".join(filter(None, received)) == "Grüße,"


@pytest.mark.parametrize("num_choices", [1, 3])
def test_closing_a_stream_aborts_its_sequences(served: Served, num_choices: int) -> None:
    served.engine.endless = True
    stream = served.client().chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, n=num_choices, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    served.wait_until(lambda: len(served.engine.aborted) == num_choices)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_gives_up_before_the_first_token_aborts_its_sequence(served: Served, stream: bool) -> None:
    served.engine.first_step_blocked = True
    with pytest.raises(openai.APITimeoutError):
        served.client().with_options(timeout=0.2).chat.completions.create(
            model="tiny", messages=MESSAGES, stream=stream
        )
    served.wait_until(lambda: len(served.engine.aborted) == 1)
    served.wait_until(lambda: 'rootstock_requests_total{operation="chat",outcome="aborted"} 1.0' in served.scrape())


def test_a_client_that_gives_up_on_a_whole_answer_aborts_it_in_the_middle(served: Served) -> None:
    served.engine.endless = True
    with pytest.raises(openai.APITimeoutError):
        served.client().with_options(timeout=0.1).chat.completions.create(model="tiny", messages=MESSAGES)
    served.wait_until(lambda: len(served.engine.aborted) == 1)


def test_a_request_that_waits_beyond_its_timeout_is_a_504_that_is_not_retried(served: Served) -> None:
    served.engine.first_step_blocked = True
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            served.client().chat.completions.create(
                model="tiny", messages=MESSAGES, stream=stream, extra_body={"timeout": 0.05}
            )
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_answer_cut_by_its_timeout_ends_its_stream_with_an_error(served: Served) -> None:
    served.engine.endless = True
    stream = served.client().chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, extra_body={"timeout": 0.1}
    )
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "deadline_exceeded"


def test_a_timeout_must_be_a_positive_number_of_seconds(served: Served) -> None:
    for timeout in (0, -1, "5", 1e9):
        with pytest.raises(openai.BadRequestError) as caught:
            served.client().chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"timeout": timeout})
        assert caught.value.param == "timeout"


def test_the_services_own_limit_bounds_every_request(tmp_path: Path) -> None:
    with serve_fake(tmp_path, request_timeout_seconds=20.0) as served:
        for asked in ({}, {"timeout": 5}, {"timeout": 90}):
            served.client().chat.completions.create(model="tiny", messages=MESSAGES, extra_body=asked)
        assert [request.timeout_seconds for request in served.engine.requests] == [20, 5, 20]
