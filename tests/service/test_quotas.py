"""Rates and quotas of a tenant: in the bucket, in the database, over a socket."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import openai
import pytest

from service.errors import QuotaExceededError, RateLimitError
from service.quotas import TenantLimits
from service.rate_limits import RateLimits, shown_duration
from service.tenants import Tenant
from tests.service.control_fixtures import Control
from tests.service.http_fixtures import Served
from tests.service.test_chat import MESSAGES

TEN = TenantLimits(requests_per_minute=10, tokens_per_minute=600)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def count(limits: RateLimits, num_tries: int) -> int:
    """How many of so many requests are let through."""
    passed = 0
    for _ in range(num_tries):
        try:
            limits.count_request("acme", TEN)
            passed += 1
        except RateLimitError:
            pass
    return passed


def test_a_minutes_worth_at_once_and_then_as_it_is_refilled() -> None:
    clock = Clock()
    limits = RateLimits(clock)
    assert count(limits, 15) == 10
    clock.now += 6.0
    assert count(limits, 5) == 1
    clock.now += 3600.0
    assert count(limits, 15) == 10  # it does not save up
    limits.count_request("zenith", TEN)


def test_a_refusal_says_when_to_come_back_and_it_is_true() -> None:
    clock = Clock()
    limits = RateLimits(clock)
    reserved = limits.reserve("acme", TEN, least=600, most=600)
    with pytest.raises(RateLimitError) as refusal:
        limits.reserve("acme", TEN, least=100, most=100)
    assert refusal.value.retry_after == pytest.approx(10.0) and refusal.value.code == "rate_limit_exceeded"
    clock.now += refusal.value.retry_after + 1e-6
    limits.reserve("acme", TEN, least=100, most=100)
    limits.settle("acme", TEN, reserved=reserved, used=50)
    assert limits.headers("acme", TEN)["x-ratelimit-remaining-tokens"] == "550"


def test_a_request_that_can_never_pass_is_told_so_and_one_without_a_limit_of_its_own_takes_what_there_is() -> None:
    limits = RateLimits(Clock())
    with pytest.raises(RateLimitError) as refusal:
        limits.reserve("acme", TEN, least=601, most=601)
    assert refusal.value.is_hopeless and refusal.value.retry_after <= 60
    assert limits.reserve("acme", TEN, least=20, most=100_000) == 600
    limits.settle("acme", TEN, reserved=600, used=700)  # more than was there: a debt
    with pytest.raises(RateLimitError) as refusal:
        limits.reserve("acme", TEN, least=590, most=590)
    assert refusal.value.retry_after <= 60


def test_many_threads_together_get_no_more_than_the_limit() -> None:
    limits, passed = RateLimits(Clock()), []
    threads = [threading.Thread(target=lambda: passed.append(count(limits, 50))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(passed) == 10


def test_durations_are_written_as_openai_does() -> None:
    assert [shown_duration(seconds) for seconds in (0.0, 0.0201, 1.0, 6.25, 72.5)] == [
        "0ms", "21ms", "1s", "6.25s", "1m12.5s"
    ]  # fmt: skip


# -- over a socket ----------------------------------------------------------------------------------------------


def limit(served: Served, **limits: int | None) -> None:
    url = f"/v1/admin/tenants/{served.control.acme.id}"
    served.admin().put(url, json={"limits": limits}).raise_for_status()


def test_a_limit_holds_at_once_shows_in_headers_and_concerns_one_tenant(served: Served) -> None:
    assert not [name for name in served.http().get("/v1/models").headers if name.startswith("x-ratelimit")]
    limit(served, requests_per_minute=3)
    answers = [served.http().get("/v1/models") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0", "0"]
    refused = answers[-1]
    assert refused.headers["x-ratelimit-limit-requests"] == "3" and 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert (refused.json()["error"]["code"], refused.json()["error"]["type"]) == (
        "rate_limit_exceeded", "rate_limit_error"
    )  # fmt: skip
    assert served.client(served.control.zenith_key).models.list().data
    limit(served)
    assert served.http().get("/v1/models").status_code == 200


def test_tokens_are_reserved_and_what_was_not_used_is_given_back(served: Served) -> None:
    client = served.client()
    used = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20).usage
    assert used is not None
    limit(served, tokens_per_minute=6000)
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_tokens=20)
    reserved = 6000 - int(raw.headers["x-ratelimit-remaining-tokens"])
    assert raw.headers["x-ratelimit-limit-tokens"] == "6000" and used.total_tokens - 3 <= reserved
    left = int(served.http().get("/v1/models").headers["x-ratelimit-remaining-tokens"])
    assert abs(6000 - used.total_tokens - left) < 200  # and what has been refilled meanwhile
    limit(served, tokens_per_minute=10)
    with pytest.raises(openai.RateLimitError) as refusal:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20)
    assert refusal.value.response.headers["x-should-retry"] == "false"
    assert int(refusal.value.response.headers["retry-after"]) <= 60


def test_limits_are_changed_one_by_one_or_all_anew(served: Served) -> None:
    url, admin = f"/v1/admin/tenants/{served.control.acme.id}", served.admin()
    nothing = TenantLimits().as_dict()
    assert admin.get(url).json()["limits"] == nothing
    admin.patch(url, json={"limits": {"max_files": 3, "max_jobs": 1}}).raise_for_status()
    changed = admin.patch(url, json={"limits": {"max_files": None, "max_bytes": 5}}).json()["limits"]
    assert changed == {**nothing, "max_jobs": 1, "max_bytes": 5}
    assert admin.put(url, json={"limits": {"max_files": 2}}).json()["limits"] == {**nothing, "max_files": 2}
    for body, param in (
        ({}, "limits"),
        ({"limits": {"max_files": -1}}, "limits.max_files"),
        ({"limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
        ({"limits": {"max_cats": 1}}, "limits.max_cats"),
        ({"limits": {"max_files": True}}, "limits.max_files"),
    ):
        response = admin.patch(url, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert admin.put("/v1/admin/tenants/none", json={"limits": {}}).status_code == 404


def test_a_full_quota_is_a_403_that_names_it(served: Served) -> None:
    limit(served, max_files=0)
    with pytest.raises(openai.PermissionDeniedError) as refusal:
        served.client().files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")
    assert (refusal.value.code, refusal.value.param) == ("quota_exceeded", "max_files")


# -- in the database, on both -----------------------------------------------------------------------------------


def allow(control: Control, tenant: Tenant | None = None, **limits: int | None) -> None:
    control.tenants.change_limits((tenant or control.acme).id, limits)


def test_files_are_limited_in_number_and_bytes(control: Control) -> None:
    size = len(b'{"messages": []}\n')
    allow(control, max_files=2, max_bytes=None)
    first = control.upload()
    control.upload()
    for quota in ("max_files", "max_bytes"):
        stored = len([path for path in control.storage.rglob("*") if path.is_file()])
        with pytest.raises(QuotaExceededError) as refusal:
            control.upload()
        assert refusal.value.param == quota
        assert len([path for path in control.storage.rglob("*") if path.is_file()]) == stored  # nothing left behind
        allow(control, max_files=None, max_bytes=3 * size - 1)
    control.upload(control.zenith)
    control.files.delete(control.acme.id, first)
    control.upload()


def test_jobs_at_once_and_the_adapters_that_they_will_make_are_limited(control: Control) -> None:
    allow(control, max_jobs=1)
    job = control.create_job()
    with pytest.raises(QuotaExceededError) as refusal:
        control.create_job()
    assert refusal.value.param == "max_jobs"
    control.jobs.cancel(control.acme.id, job.id)
    allow(control, max_jobs=None, max_adapters=2)
    control.publish()
    control.create_job()
    with pytest.raises(QuotaExceededError) as refusal:
        control.create_job()
    assert refusal.value.param == "max_adapters"
    control.create_job(control.zenith)


def test_the_last_place_is_given_once_however_many_ask(control: Control) -> None:
    allow(control, max_files=3)
    refused: list[str] = []

    def upload() -> None:
        try:
            control.upload()
        except QuotaExceededError:
            refused.append("")

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(control.files.list(control.acme.id).items) == 3 and len(refused) == 5
