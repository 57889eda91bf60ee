"""Embeddings through the official client over a real socket; only the engine is a fake."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import openai
import pytest

from service.engine.errors import QueueFullError
from tests.service.http_fixtures import Served


def expected(text: str, dimensions: int = 8) -> list[float]:
    """What the fake makes of a text, in the service's own arithmetic."""
    vector = np.resize(np.array([ord(c) for c in text], dtype=np.float32), 8)
    first = (vector / np.linalg.norm(vector))[:dimensions]
    return [float(x) for x in first / np.linalg.norm(first)]


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("Hello", ["Hello"]),
        (["Hello", "Bye"], ["Hello", "Bye"]),
        ([72, 105], ["Hi"]),
        ([[72, 105], [72, 111]], ["Hi", "Ho"]),
    ],
)
def test_an_input_is_text_or_tokens_one_or_many(shared_service: Served, given: Any, texts: list[str]) -> None:
    answer = shared_service.client().embeddings.create(model="tiny", input=given, encoding_format="float")
    assert (answer.object, answer.model) == ("list", "tiny")
    assert [one.index for one in answer.data] == list(range(len(texts)))
    for one, text in zip(answer.data, texts, strict=True):
        assert one.embedding == pytest.approx(expected(text))
    num_tokens = sum(map(len, texts))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)


def test_what_the_client_asks_for_by_default_are_the_same_numbers_in_base64(shared_service: Served) -> None:
    # Strict validation would refuse OpenAI's own base64: the client decodes it only after it has validated.
    floats = shared_service.client().embeddings.create(model="tiny", input="Hello", encoding_format="float")
    by_default = shared_service.client(strict=False).embeddings.create(model="tiny", input="Hello")
    assert by_default.data[0].embedding == floats.data[0].embedding
    body = {"model": "tiny", "input": "Hello", "encoding_format": "base64"}
    raw = shared_service.http().post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(raw), "<f4").tolist() == floats.data[0].embedding


def test_dimensions_cut_the_vector_and_bring_it_back_to_length_one(shared_service: Served) -> None:
    client = shared_service.client()
    answer = client.embeddings.create(model="tiny", input="Hello", dimensions=3, encoding_format="float", user="u")
    assert answer.data[0].embedding == pytest.approx(expected("Hello", 3))
    whole = client.embeddings.create(model="tiny", input="Hello", dimensions=8, encoding_format="float")
    assert whole.data[0].embedding == pytest.approx(expected("Hello"))


def test_a_model_is_resolved_and_its_digest_named(served: Served) -> None:
    digest = "e" * 64
    model = served.control.publish(suffix="letters", digest=digest)
    served.control.registry.aliases.set(served.control.acme.id, "best", model)
    for name in (model, "best"):
        raw = served.client().embeddings.with_raw_response.create(model=name, input="Hello", encoding_format="float")
        assert raw.parse().model == model
        assert raw.headers["x-rootstock-adapter"] == digest
    assert {(r.adapter, r.pooling, r.tenant) for r in served.engine.requests} == {
        (digest, True, served.control.acme.id)
    }
    raw = served.client().embeddings.with_raw_response.create(model="tiny", input="Hello", encoding_format="float")
    assert "x-rootstock-adapter" not in raw.headers
    with pytest.raises(openai.NotFoundError):
        served.client(served.control.zenith_key).embeddings.create(model=model, input="Hello")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": 7}, "input"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[5], []]}, "input[1]"),
        ({"input": ["a", [5]]}, "input[1]"),
        ({"input": [[5], ["a"]]}, "input[1]"),
        ({"input": [5, "a"]}, "input"),
        ({"input": [True]}, "input[0]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [[5], [0x110000]]}, "input[1]"),
        ({"input": ["a", "b" * 257]}, "input[1]"),
        ({"input": ["b" * 256] * 1200}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 9}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "prompt": "b"}, "prompt"),
        ({}, "input"),
    ],
)
def test_a_field_that_is_wrong_is_named(shared_service: Served, fields: dict[str, object], param: str) -> None:
    answer = shared_service.http().post("/v1/embeddings", json={"model": "tiny", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_input_as_long_as_the_context_fits(shared_service: Served) -> None:
    client = shared_service.client()
    answer = client.embeddings.create(model="tiny", input="a" * 256, encoding_format="float")
    assert answer.usage.prompt_tokens == 256
    with pytest.raises(openai.BadRequestError) as refusal:
        client.embeddings.create(model="tiny", input="a" * 257)
    assert refusal.value.code == "context_length_exceeded"


def test_many_inputs_take_a_share_of_the_engine_and_keep_their_order(served: Served) -> None:
    texts = [chr(97 + number % 26) * (1 + number % 7) for number in range(2048)]
    answer = served.client().embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [one.index for one in answer.data] == list(range(2048))
    assert all(
        one.embedding == pytest.approx(expected(text)) for one, text in zip(answer.data[:60], texts, strict=False)
    )
    assert 1 < served.engine.most_running <= 8, "a quarter of 32 seats"
    served.engine.most_running = 0
    served.client().embeddings.create(model="tiny", input=["a" * 200] * 20, encoding_format="float")
    assert 1 < served.engine.most_running <= 2, "half of 512 tokens, in chunks of 128"


def test_the_first_failure_ends_the_request_and_aborts_the_rest(served: Served) -> None:
    served.engine.fails_after = 1
    with pytest.raises(openai.InternalServerError, match="the adapter is damaged"):
        served.client().embeddings.create(model="tiny", input=["a"] * 50)
    assert len(served.engine.requests) < 50 and served.engine.num_running == 0
    served.engine.refusal = QueueFullError("too many", retry_after=3)
    with pytest.raises(openai.RateLimitError) as refusal:
        served.client().embeddings.create(model="tiny", input=["a"] * 50)
    assert refusal.value.response.headers["retry-after"] == "3"


def test_a_client_that_leaves_aborts_what_runs(served: Served) -> None:
    served.engine.first_step_blocked = True
    with pytest.raises(openai.APITimeoutError):
        served.client().with_options(timeout=0.3).embeddings.create(model="tiny", input=["a"] * 20)
    served.wait_until(lambda: len(served.engine.aborted) == 8)
    assert served.engine.num_running == 0


def test_embeddings_are_counted_under_their_own_operation(served: Served) -> None:
    served.client().embeddings.create(model="tiny", input=["Hello", "Bye"], encoding_format="float")
    served.wait_until(
        lambda: 'rootstock_requests_total{operation="embeddings",outcome="success"} 1.0' in served.scrape()
    )
    assert 'rootstock_queue_wait_seconds_count{operation="embeddings"} 2.0' in served.scrape()
