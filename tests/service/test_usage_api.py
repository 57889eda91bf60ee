"""What answers cost, over a socket: the books equal what clients were told."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import openai
import pytest

from service.errors import UnavailableError
from service.usage_rows import DELETED_MODEL
from tests.service.http_fixtures import Served
from tests.service.test_chat import MESSAGES

NAMES = ("num_model_requests", "input_tokens", "output_tokens", "input_cached_tokens")
START = {"start_time": int(time.time()) - 7200}


def usage(served: Served, key: str | None = None, **query: Any) -> list[dict[str, Any]]:
    body = served.http(key).get("/v1/usage", params={**START, **query}).raise_for_status().json()
    return [result for bucket in body["data"] for result in bucket["results"]]


def sums(results: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    return tuple(sum(result[name] for result in results) for name in NAMES)


def test_the_books_equal_the_usage_that_clients_were_told(served: Served) -> None:
    client, told = served.client(), []
    served.engine.cached = {"0": 3}
    for n in (1, 3):
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, n=n)
        assert answer.usage is not None
        told.append(answer.usage)
    for number in (1, 2):
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=number, stream=True, stream_options={"include_usage": True}
        )
        *_, last = stream
        assert last.usage is not None
        told.append(last.usage)
        assert sums(usage(served))[0] == len(told)  # there before the client knew
    prompts = client.completions.create(model="tiny", prompt=["ab", "abc"])
    assert prompts.usage is not None
    told.append(prompts.usage)
    vectors = served.http().post("/v1/embeddings", json={"model": "tiny", "input": ["abcd", "abcde"]}).json()
    expected = (
        len(told) + 1,
        sum(one.prompt_tokens for one in told) + vectors["usage"]["prompt_tokens"],
        sum(one.completion_tokens for one in told),
        sum((one.prompt_tokens_details.cached_tokens or 0) for one in told if one.prompt_tokens_details),
    )
    assert sums(usage(served)) == expected and expected[3] > 0
    assert usage(served, served.control.zenith_key) == []


def test_a_stream_that_its_client_leaves_costs_what_was_generated(served: Served) -> None:
    served.engine.endless = True
    with served.http().stream(
        "POST", "/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "stream": True}
    ) as response:
        lines = response.iter_lines()
        for _ in range(12):
            next(lines)
    served.wait_until(lambda: usage(served) != [])
    ((requests, prompt, completion, _),) = [sums(usage(served))]
    assert requests == 1 and prompt > 0 and completion >= 4


def test_a_whole_answer_that_its_client_does_not_wait_for_costs_what_was_generated(served: Served) -> None:
    served.engine.endless = True
    with pytest.raises(openai.APITimeoutError):
        served.client().with_options(timeout=0.1).chat.completions.create(model="tiny", messages=MESSAGES)
    served.wait_until(lambda: usage(served) != [])
    assert sums(usage(served))[2] > 0


def test_an_answer_that_the_service_failed_to_give_costs_nothing(served: Served) -> None:
    served.engine.fails_after = 2
    with pytest.raises(openai.InternalServerError):
        served.client().chat.completions.create(model="tiny", messages=MESSAGES)
    with pytest.raises(openai.APIError):
        list(served.client(strict=False).chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    served.engine.fails_after = None
    served.client().chat.completions.create(model="tiny", messages=MESSAGES)
    assert sums(usage(served))[0] == 1


def test_usage_is_not_told_when_it_cannot_be_booked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*args: object) -> None:
        raise UnavailableError("the books are closed")

    monkeypatch.setattr("service.api.meter.Meter.book", refuse)
    ask = {"model": "tiny", "messages": MESSAGES, "stream_options": {"include_usage": True}, "stream": True}
    text = served.http().post("/v1/chat/completions", json=ask).text
    assert '"usage":{' not in text and "the books are closed" in text
    response = served.http().post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES})
    assert response.status_code == 503 and "usage" not in response.json()


def test_groups_buckets_and_pages(served: Served) -> None:
    second = served.http().post("/v1/keys", json={"name": "b"}).raise_for_status().json()
    for key in (served.control.acme_key, second["api_key"], second["api_key"]):
        served.client(key).chat.completions.create(model="tiny", messages=MESSAGES)
    by_key = {result["api_key_id"]: result["num_model_requests"] for result in usage(served, group_by="api_key")}
    assert by_key == {served.control.acme_key.split("-")[1]: 1, second["id"]: 2}
    (whole,) = usage(served, group_by="model")
    assert (whole["model"], whole["api_key_id"], whole["num_model_requests"]) == ("tiny", None, 3)
    http = served.http()
    query: dict[str, str | int] = {**START, "bucket_width": "1h", "limit": "1"}
    pages = [http.get("/v1/usage", params=query).raise_for_status().json()]
    while pages[-1]["has_more"]:
        query["page"] = pages[-1]["next_page"]
        pages.append(http.get("/v1/usage", params=query).raise_for_status().json())
    buckets = [bucket for page in pages for bucket in page["data"]]
    assert 3 <= len(buckets) <= 4
    assert all(after["start_time"] == before["end_time"] for before, after in pairwise(buckets))
    assert sum(sums(bucket["results"])[0] for bucket in buckets) == 3


def test_the_bill_is_a_csv_of_all_tenants(served: Served) -> None:
    for key in (served.control.acme_key, served.control.zenith_key):
        served.client(key).chat.completions.create(model="tiny", messages=MESSAGES)
    served.admin().delete(f"/v1/admin/tenants/{served.control.zenith.id}").raise_for_status()
    response = served.admin().get("/v1/admin/usage", params={"start_time": 0, "format": "csv"}).raise_for_status()
    assert response.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(response.text)))
    assert {(row["tenant_id"], row["tenant"], row["model"], row["requests"]) for row in rows} == {
        (served.control.acme.id, "acme", "tiny", "1"),
        (served.control.zenith.id, "", DELETED_MODEL, "1"),
    }
    page = served.admin().get("/v1/admin/usage", params={**START, "group_by": "tenant,model"}).json()
    assert {result["tenant_id"] for bucket in page["data"] for result in bucket["results"]} == {
        served.control.acme.id, served.control.zenith.id
    }  # fmt: skip
    assert served.http().get("/v1/admin/usage", params=START).status_code == 403


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({}, "start_time"),
        ({"start_time": "-1"}, "start_time"),
        ({"start_time": "9" * 30}, "start_time"),
        ({"start_time": "5", "end_time": "5"}, "end_time"),
        ({"start_time": "0", "bucket_width": "1m"}, "bucket_width"),
        ({"start_time": "0", "group_by": "tenant"}, "group_by"),
        ({"start_time": "0", "group_by": "model,model"}, "group_by"),
        ({"start_time": "0", "limit": "32"}, "limit"),
        ({"start_time": "0", "page": "7"}, "page"),
        ({"start_time": "0", "tenant_id": "x"}, "tenant_id"),
    ],
)
def test_a_wrong_query_is_told_by_its_name(shared_service: Served, query: dict[str, str], param: str) -> None:
    response = shared_service.http().get("/v1/usage", params=query)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
