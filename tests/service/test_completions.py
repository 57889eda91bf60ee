"""Legacy completions through the official client over a real socket; only the engine is a fake."""

from __future__ import annotations

from typing import Any

import pytest

from tests.service.http_fixtures import Served

TEXT = "Grüße, world!"


def test_an_answer_has_the_shape_the_official_client_insists_on(shared_service: Served) -> None:
    answer = shared_service.client().completions.create(model="tiny", prompt="Hello")
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == "tiny"
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, TEXT, "stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 4, 9)


def test_sixteen_tokens_are_the_default(served: Served) -> None:
    served.engine.endless = True
    answer = served.client().completions.create(model="tiny", prompt="Hello")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Hello", ["Hello"]),
        (["Hello", "Bye"], ["Hello", "Bye"]),
        ([72, 105], ["Hi"]),
        ([[72, 105], [72, 111]], ["Hi", "Ho"]),
    ],
)
def test_a_prompt_is_text_or_tokens_one_or_many(served: Served, prompt: Any, texts: list[str]) -> None:
    answer = served.client().completions.create(model="tiny", prompt=prompt)
    assert ["".join(map(chr, request.prompt_token_ids)) for request in served.engine.requests] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, texts))


def test_choices_are_ordered_by_prompt_and_a_prompt_counts_once(served: Served) -> None:
    answer = served.client().completions.create(model="tiny", prompt=["a", "bb"], n=2, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    asked = {request.request_id.rsplit("-", 1)[1]: request for request in served.engine.requests}
    assert [len(asked[index].prompt_token_ids) for index in "0123"] == [1, 1, 2, 2]
    assert [asked[index].sampling.seed for index in "0123"] == [5, 6, 5, 6]
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 16)


def test_cached_tokens_are_those_that_no_choice_of_a_prompt_computed(served: Served) -> None:
    served.engine.cached = {"0": 0, "1": 64, "2": 32, "3": 96}
    answer = served.client().completions.create(model="tiny", prompt=["a", "bb"], n=2)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 32


def test_a_stream_adds_up_to_the_whole_and_reports_usage(shared_service: Served) -> None:
    # Strict validation would refuse OpenAI's own streams here: they too say `finish_reason: null` until the end.
    client = shared_service.client(strict=False)
    *chunks, usage = client.completions.create(
        model="tiny", prompt="Hello", stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert usage.choices == [] and usage.usage is not None and usage.usage.completion_tokens == 4


def test_log_probabilities_have_the_legacy_shape(shared_service: Served) -> None:
    answer = shared_service.client().completions.create(model="tiny", prompt="Hello", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["Grüße", ",", " world", "!"]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.text_offset == [0, 5, 6, 12]
    assert logprobs.top_logprobs is not None and logprobs.top_logprobs[0] == {"Grüße": -0.5, "other0": -2.0}


def test_without_alternatives_the_chosen_token_is_still_reported(shared_service: Served) -> None:
    answer = shared_service.client().completions.create(model="tiny", prompt="Hello", logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[1] == {",": -0.5}


def test_streamed_offsets_go_on_where_the_last_chunk_ended(shared_service: Served) -> None:
    client = shared_service.client(strict=False)
    offsets = [
        offset
        for chunk in client.completions.create(model="tiny", prompt="Hello", logprobs=1, stream=True)
        if chunk.choices[0].logprobs
        for offset in chunk.choices[0].logprobs.text_offset or []
    ]
    assert offsets == [0, 5, 6, 12]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [0x110000]}, "prompt"),
        ({"prompt": ["a"] * 300}, "prompt"),
        ({"prompt": "a" * 250}, "prompt"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({}, "prompt"),
    ],
)
def test_a_field_that_is_wrong_or_unsupported_is_named(
    shared_service: Served, fields: dict[str, object], param: str
) -> None:
    http = shared_service.http()
    answer = http.post("/v1/completions", json={"model": "tiny", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_closing_a_stream_of_several_prompts_aborts_them_all(served: Served) -> None:
    served.engine.endless = True
    client = served.client(strict=False)
    stream = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    served.wait_until(lambda: len(served.engine.aborted) == 2)
