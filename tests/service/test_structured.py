"""Structured output through the official client, on a real engine with random weights: the form holds all the same."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.service.real_service import RealService, real_service

__all__ = ["real_service"]

MESSAGES: Any = [{"role": "user", "content": "How many adapters are resident?"}]


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    colour: Colour
    size: int = Field(ge=1, le=99)


class Box(BaseModel):
    """Nested, with a reference, an optional field and a list."""

    label: str = Field(max_length=6)
    sealed: bool
    note: Literal["fragile", "heavy"] | None
    parts: list[Part] = Field(min_length=1, max_length=2)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    barks: bool


class Pet(BaseModel):
    pet: Cat | Dog


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Part, Box, Pet])
@pytest.mark.parametrize("tuned", [False, True])
def test_the_official_client_parses_every_answer_into_its_model(
    shape: type[BaseModel], tuned: bool, real_service: RealService
) -> None:
    answer = real_service.client().chat.completions.parse(
        model=real_service.tuned if tuned else "tiny",
        messages=MESSAGES,
        response_format=shape,
        n=4,
        seed=1,
        max_tokens=300,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, shape)


@pytest.mark.slow
def test_a_streamed_answer_adds_up_to_the_same_form(real_service: RealService) -> None:
    with real_service.client().chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Box, seed=2, max_tokens=300
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Box)


@pytest.mark.slow
def test_a_json_object_is_one(real_service: RealService) -> None:
    client, complete = real_service.client(), 0
    for seed in range(6):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, seed=seed, max_tokens=200
        )
        text = answer.choices[0].message.content or ""
        assert text.startswith("{")
        if answer.choices[0].finish_reason == "stop":
            complete += 1
            assert isinstance(json.loads(text), dict)
    assert complete, "some answer must end by itself, or this test shows nothing"


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["one", "two words", "drei"]}, "one|two words|drei"),
        ({"grammar": 'start: ("ab" | "c"){2,5} "."'}, r"(ab|c){2,5}\."),
        ({"json": {"enum": [1, "x"]}}, '1|"x"'),
        ({"json": '{"type": "boolean"}'}, "true|false"),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_vllms_structured_outputs_hold_on_both_endpoints(
    asked: dict[str, Any], pattern: str, endpoint: str, real_service: RealService
) -> None:
    client, extra = real_service.client(), {"structured_outputs": asked}
    for seed in range(3):
        text: str | None
        if endpoint == "chat":
            chat = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=seed, extra_body=extra)
            text = chat.choices[0].message.content
        else:
            plain = client.completions.create(model="tiny", prompt="So:", seed=seed, max_tokens=40, extra_body=extra)
            text = plain.choices[0].text
        assert re.fullmatch(pattern, text or ""), text


@pytest.mark.slow
def test_free_answers_are_the_same_with_and_without_structured_neighbours(real_service: RealService) -> None:
    client = real_service.client()

    def free(seed: int) -> str | None:
        model = real_service.tuned if seed % 2 else "tiny"
        answer = client.chat.completions.create(model=model, messages=MESSAGES, seed=seed, max_tokens=60)
        return answer.choices[0].message.content

    def bound(seed: int) -> None:
        extra = {"structured_outputs": {"regex": "[a-z ]{80}"}}
        client.chat.completions.create(model="tiny", messages=MESSAGES, seed=seed, max_tokens=200, extra_body=extra)

    alone = [free(seed) for seed in range(6)]
    with ThreadPoolExecutor(12) as pool:
        neighbours = [pool.submit(bound, seed) for seed in range(6)]
        together = list(pool.map(free, range(6)))
        for neighbour in neighbours:
            neighbour.result()
    assert together == alone


def test_each_schema_is_compiled_once(real_service: RealService) -> None:
    client = real_service.client()
    before = real_service.grammars.num_compiled
    for seed in range(3):
        extra = {"structured_outputs": {"choice": ["only", "here"]}}
        client.chat.completions.create(model="tiny", messages=MESSAGES, seed=seed, n=2, extra_body=extra)
    assert real_service.grammars.num_compiled == before + 1


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (schema({"type": "bogus"}), "response_format.json_schema.schema"),
        (schema({"type": "array", "uniqueItems": True}), "response_format.json_schema.schema"),
        (schema({"$ref": "https://example.com/x"}), "response_format.json_schema.schema"),
        (schema({"type": "integer", "multipleOf": 999_999_937}), "response_format.json_schema.schema"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": {"type": "bogus"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_cannot_be_kept_to_is_a_400_that_names_the_field(
    body: dict[str, Any], param: str, path: str, real_service: RealService
) -> None:
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "x"}
    answer = real_service.http().post(path, json={"model": "tiny", **prompt, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and param in error["message"] and error["type"] == "invalid_request_error"


def test_a_bias_forces_and_bans_through_the_api(real_service: RealService) -> None:
    client = real_service.client()
    forced = client.completions.create(model="tiny", prompt="So:", max_tokens=4, logit_bias={"40": 100})
    assert forced.choices[0].text == real_service.base.tokenizer.decode([40] * 4)
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        seed=1,
        max_tokens=20,
        logit_bias={"40": -100},
        extra_body={"structured_outputs": {"regex": "[a-z]{5,9}"}},
    )
    assert re.fullmatch("[a-z]{5,9}", answer.choices[0].message.content or "")


def test_logprobs_of_a_constrained_answer_are_the_models_own(real_service: RealService) -> None:
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    answer = real_service.client().chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, extra_body=extra
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    tops = [{other.token for other in token.top_logprobs} for token in logprobs.content]
    assert any(token.token not in top for token, top in zip(logprobs.content, tops, strict=True))


def test_a_schema_too_deep_for_any_parser_is_a_clear_refusal(real_service: RealService) -> None:
    deep = '{"items":' * 5000 + "{}" + "}" * 5000
    body = '{"model":"tiny","messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema",'
    answer = real_service.http().post(
        "/v1/chat/completions",
        content=f'{body}"json_schema":{{"name":"s","schema":{deep}}}}}}}',
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    with pytest.raises(openai.BadRequestError):
        real_service.client().chat.completions.create(
            model="tiny", messages=MESSAGES, extra_body={"structured_outputs": {"regex": "a" * 20_000}}
        )
