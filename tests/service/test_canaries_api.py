"""Canary, shadow, promotion and experiments over a socket, with a fake engine; one test with a real one."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from tests.service.http_fixtures import Served
from tests.service.real_service import ADAPTER, RealService, real_service

pytestmark = pytest.mark.slow

__all__ = ["real_service"]

CANARY = "/v1/aliases/best/canary"
ASK = {"model": "best", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}


def start(served: Served, percent: float = 50.0, **policy: object) -> tuple[str, str]:
    """A canary on the alias `best`; the stable model and the candidate."""
    stable, candidate = (served.control.publish(digest=letter * 64) for letter in "ab")
    http = served.http()
    http.put("/v1/aliases/best", json={"model": stable}).raise_for_status()
    http.put(CANARY, json={"model": candidate, "percent": percent, **policy}).raise_for_status()
    return stable, candidate


def ask(http: httpx.Client, **fields: object) -> httpx.Response:
    return http.post("/v1/chat/completions", json={**ASK, **fields})


def user_on(http: httpx.Client, arm: str, prefix: str = "u") -> str:
    """A new end user of that side."""
    for number in range(1000):
        name = f"{prefix}{number}"
        if ask(http, user=name).headers["x-rootstock-arm"] == arm:
            return name
    raise AssertionError(f"nobody is on {arm}")


def test_a_canary_lives_from_put_to_promotion(served: Served) -> None:
    stable, candidate = start(served, 50.0, min_samples=5)
    http = served.http()
    for arm, model, letter in (("stable", stable, "a"), ("canary", candidate, "b")):
        name = user_on(http, arm)
        for path, body in (("chat/completions", ASK), ("completions", {"model": "best", "prompt": "Hi"})):
            answer = http.post(f"/v1/{path}", json={**body, "user": name})
            assert answer.headers["x-rootstock-arm"] == arm
            assert answer.headers["x-rootstock-adapter"] == letter * 64
            assert answer.json()["model"] == model
        with http.stream("POST", "/v1/chat/completions", json={**ASK, "user": name, "stream": True}) as stream:
            assert stream.headers["x-rootstock-arm"] == arm and list(stream.iter_lines())
    served.wait_until(lambda: http.get(CANARY).json()["arms"]["canary"]["requests"] >= 3)
    body = http.get(CANARY).json()
    assert (body["object"], body["kind"], body["status"]) == ("alias.experiment", "canary", "running")
    assert (body["model"], body["stable_model"], body["percent"]) == (candidate, stable, 50.0)
    assert body["policy"]["min_samples"] == 5 and body["policy"]["auto_promote"] is False
    arm = body["arms"]["canary"]
    assert arm["finish_reasons"] == {"stop": arm["requests"], "length": 0}
    assert arm["error_rate"]["value"] == 0.0 and arm["latency_seconds"]["value"] > 0
    low, high = body["tests"]["error_rate"]["anytime_interval"]
    assert low < 0 < high and body["tests"]["error_rate"]["threshold"] == 40.0
    moved = http.post("/v1/aliases/best/promote").raise_for_status().json()
    assert (moved["model"], moved["history"][0]["kind"]) == (candidate, "promoted")
    answer = ask(http, user=name)
    assert "x-rootstock-arm" not in answer.headers and answer.json()["model"] == candidate
    (listed,) = http.get("/v1/aliases/best/experiments").json()["data"]
    assert (listed["status"], listed["outcome"]) == ("ended", "promoted")
    assert http.get(CANARY).json()["error"]["code"] == "canary_not_found"


def test_who_asks_is_told_by_user_then_session_then_the_first_turn(served: Served) -> None:
    start(served)
    http = served.http()
    by = {"stable": user_on(http, "stable"), "canary": user_on(http, "canary")}

    def side(headers: dict[str, str] | None = None, **fields: object) -> str:
        answer = http.post("/v1/chat/completions", json={**ASK, **fields}, headers=headers)
        return str(answer.headers["x-rootstock-arm"])

    sessions = {side({"x-rootstock-session": f"s{number}"}): f"s{number}" for number in range(40)}
    assert set(sessions) == {"stable", "canary"}
    for arm, session in sessions.items():
        assert side({"x-rootstock-session": session}, messages=[{"role": "user", "content": "other"}]) == arm
        for user_arm, name in by.items():
            assert side({"x-rootstock-session": session}, user=name) == user_arm
    turns = {side(messages=[{"role": "user", "content": f"turn {n}"}]): f"turn {n}" for n in range(40)}
    assert set(turns) == {"stable", "canary"}
    for arm, text in turns.items():
        later = [{"role": "assistant", "content": "So?"}, {"role": "user", "content": "And so on."}]
        assert side(messages=[{"role": "user", "content": text}, *later]) == arm
    refused = http.post("/v1/chat/completions", json=ASK, headers={"x-rootstock-session": "x" * 257})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-rootstock-session")


def test_a_failing_canary_is_taken_back_within_a_few_requests(served: Served) -> None:
    _, candidate = start(served, 50.0, min_samples=8)
    http = served.http()
    served.engine.failing_adapters = {"b" * 64}
    num_failed = 0
    for number in range(200):
        answer = ask(http, user=f"u{number}")
        num_failed += answer.status_code == 500
        if number % 10 == 9:
            served.rollout.traffic.flush()
        if http.get(CANARY).status_code == 404:
            break
    assert 8 <= num_failed < 100
    (experiment,) = http.get("/v1/aliases/best/experiments").json()["data"]
    assert experiment["outcome"] == "rolled_back" and "Errors are more frequent" in experiment["reason"]
    assert all(ask(http, user=f"u{number}").status_code == 200 for number in range(30))
    assert 'rootstock_canary_ends_total{outcome="rolled_back",reason="error"} 1.0' in served.scrape()
    assert http.get("/v1/models").json()["data"][1]["id"] == candidate, "the version itself stays"


def test_feedback_of_many_users_takes_a_canary_back_and_one_user_alone_does_not(served: Served) -> None:
    start(served, 50.0, min_samples=10)
    http = served.http()
    ids: dict[str, list[str]] = {"stable": [], "canary": []}
    for number in range(50):
        answer = ask(http, user=f"u{number}")
        ids[answer.headers["x-rootstock-arm"]].append(answer.json()["id"])
    loud = user_on(http, "canary", "loud")
    for _ in range(12):
        opinion = {"completion_id": ask(http, user=loud).json()["id"], "rating": "down"}
        http.post("/v1/feedback", json=opinion).raise_for_status()
    for completion in ids["stable"]:
        http.post("/v1/feedback", json={"completion_id": completion, "rating": "up"}).raise_for_status()
    served.rollout.traffic.flush()
    body = http.get(CANARY).raise_for_status().json()
    assert body["arms"]["canary"]["rating"]["count"] == 12 and body["arms"]["canary"]["down_share"]["count"] == 1
    for completion in ids["canary"]:
        http.post("/v1/feedback", json={"completion_id": completion, "rating": "down"}).raise_for_status()
    served.rollout.traffic.flush()
    (experiment,) = http.get("/v1/aliases/best/experiments").json()["data"]
    assert experiment["outcome"] == "rolled_back" and "Feedback is worse" in experiment["reason"]
    assert experiment["comparison"]["down_share"]["difference"] == 1.0


def test_a_client_that_leaves_or_sets_a_short_timeout_says_nothing_of_the_model(served: Served) -> None:
    start(served, 50.0)
    http = served.http()
    name = user_on(http, "canary")
    served.engine.endless = True
    assert ask(http, user=name, timeout=0.02, max_tokens=100).status_code == 504
    with http.stream("POST", "/v1/chat/completions", json={**ASK, "user": name, "stream": True}) as stream:
        next(stream.iter_lines())
    served.wait_until(lambda: http.get(CANARY).json()["arms"]["canary"]["aborted_rate"]["value"])
    arm = http.get(CANARY).json()["arms"]["canary"]
    assert arm["error_rate"]["value"] == 0.0 and round(arm["aborted_rate"]["value"] * arm["requests"]) == 1


def test_wrong_requests_name_the_field(served: Served) -> None:
    _, candidate = start(served)
    http = served.http()
    for path, body, status, param in (
        ("canary", {"model": candidate}, 400, "percent"),
        ("canary", {"model": candidate, "percent": 0}, 400, "percent"),
        ("canary", {"model": candidate, "percent": 100}, 400, "percent"),
        ("canary", {"model": candidate, "percent": 5, "colour": 1}, 400, "colour"),
        ("canary", {"model": candidate, "percent": 5, "min_samples": 0}, 400, "min_samples"),
        ("canary", {"model": candidate, "percent": 5, "max_error_increase": 1}, 400, "max_error_increase"),
        ("canary", {"model": "ft:none", "percent": 5}, 404, "model"),
        ("shadow", {"model": candidate, "percent": 101}, 400, "percent"),
        ("shadow", {"model": "best", "percent": 5}, 404, "model"),
    ):
        response = http.put(f"/v1/aliases/best/{path}", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param), body
    assert http.post("/v1/aliases/best/promote", json={"modle": "x"}).json()["error"]["param"] == "modle"
    assert http.get("/v1/aliases/best/experiments", params={"colour": 1}).status_code == 400
    assert http.delete(f"/v1/models/{candidate}").json()["error"]["code"] == "model_in_use"


def test_another_tenant_sees_nothing_and_moves_nothing(served: Served) -> None:
    _, candidate = start(served)
    other = served.http(served.control.zenith_key)
    put: dict[str, Any] = {"model": candidate, "percent": 5}
    for response in (
        *(other.get(f"/v1/aliases/best/{path}") for path in ("canary", "shadow", "experiments")),
        *(other.delete(f"/v1/aliases/best/{path}") for path in ("canary", "shadow")),
        *(other.put(f"/v1/aliases/best/{path}", json=put) for path in ("canary", "shadow")),
        other.post("/v1/aliases/best/promote"),
        other.post("/v1/aliases/best/promote", json={"model": candidate}),
    ):
        assert response.status_code == 404
    assert served.http().get(CANARY).json()["status"] == "running"


def test_a_canary_that_is_ended_by_hand_answers_what_the_canary_had_shown(served: Served) -> None:
    start(served)
    ended = served.http().delete(CANARY).raise_for_status().json()
    assert (ended["outcome"], ended["reason"]) == ("aborted", "It was ended by hand.")
    assert "x-rootstock-arm" not in ask(served.http()).headers


def test_a_shadow_answers_copies_that_nobody_sees(served: Served) -> None:
    stable, candidate = (served.control.publish(digest=letter * 64) for letter in "ab")
    http = served.http()
    http.put("/v1/aliases/best", json={"model": stable}).raise_for_status()
    http.put("/v1/aliases/best/shadow", json={"model": candidate, "percent": 100}).raise_for_status()
    assert ask(http).json()["model"] == stable
    served.rollout.traffic.flush()
    shadow = "/v1/aliases/best/shadow"
    assert http.get(shadow).json()["arms"]["shadow"]["dropped_rate"]["value"] == 1.0, "others wait"
    served.engine.num_waiting = 0
    for number in range(3):
        answer = ask(http, user=f"u{number}")
        assert answer.json()["model"] == stable and "x-rootstock-arm" not in answer.headers
        served.wait_until(lambda: not served.engine.num_running)
    served.wait_until(lambda: http.get(shadow).json()["arms"]["shadow"]["agreement_rate"]["count"] == 3)
    body = http.get(shadow).json()
    assert body["arms"]["shadow"]["requests"] == 4 and body["arms"]["shadow"]["agreement_rate"]["value"] == 1.0
    assert body["arms"]["shadow"]["nll_per_token"]["value"] == 0.5
    assert body["comparison"]["completion_tokens"]["difference"] == 0.0
    copies = [request for request in served.engine.requests if request.adapter == "b" * 64]
    assert len(copies) == 3 and all(copy.priority < -10 for copy in copies)
    assert {copy.tenant for copy in copies} == {f"{served.control.acme.id}/shadow"}
    ended = http.delete(shadow).json()
    assert ended["outcome"] == "aborted" and "canary" not in ended["arms"]


def test_a_real_engine_answers_for_both_sides_and_for_the_shadow(real_service: RealService) -> None:
    http, control = real_service.http(), real_service.control
    candidate = control.publish(suffix="candidate", digest=ADAPTER)
    for path in ("", "/canary", "/shadow"):
        body: dict[str, Any] = {"model": real_service.tuned if not path else candidate}
        if path:
            body["percent"] = 50 if path == "/canary" else 100
        http.put(f"/v1/aliases/best{path}", json=body).raise_for_status()
    fields: dict[str, Any] = {**ASK, "max_tokens": 8}
    arms = []
    for number in range(12):
        answer = http.post("/v1/chat/completions", json={**fields, "user": f"u{number}"}).raise_for_status()
        arms.append(answer.headers["x-rootstock-arm"])
        assert answer.json()["model"] == (candidate if arms[-1] == "canary" else real_service.tuned)
        assert answer.headers["x-rootstock-adapter"] == ADAPTER
        assert answer.json()["choices"][0]["logprobs"] is None
        opinion = {"completion_id": answer.json()["id"], "rating": "up"}
        assert http.post("/v1/feedback", json=opinion).raise_for_status().json()["arm"] == arms[-1]
    assert set(arms) == {"stable", "canary"}
    deadline = time.monotonic() + 20
    while not (shadow := http.get("/v1/aliases/best/shadow").json())["arms"]["shadow"]["agreement_rate"]["count"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert shadow["arms"]["shadow"]["agreement_rate"]["value"] == 1.0, "both are the same adapter"
    assert shadow["arms"]["shadow"]["nll_per_token"]["value"] > 0
    canary = http.get("/v1/aliases/best/canary").json()
    assert canary["arms"]["canary"]["requests"] == arms.count("canary")
    assert canary["arms"]["canary"]["finish_reasons"]["length"] + canary["arms"]["canary"]["finish_reasons"]["stop"]
    assert http.delete("/v1/aliases/best").raise_for_status().json()["deleted"]
    assert "x-rootstock-arm" not in http.post("/v1/chat/completions", json={**ASK, "model": candidate}).headers


@pytest.mark.parametrize("what", ["canary", "shadow"])
def test_deleting_the_alias_ends_what_runs_on_it(served: Served, what: str) -> None:
    stable, candidate = start(served)
    http = served.http()
    http.put("/v1/aliases/best/shadow", json={"model": candidate, "percent": 5}).raise_for_status()
    http.delete("/v1/aliases/best").raise_for_status()
    ended = {one["kind"]: one["outcome"] for one in http.get("/v1/aliases/best/experiments").json()["data"]}
    assert ended[what] == "alias_deleted"
    for model in (stable, candidate):
        assert http.delete(f"/v1/models/{model}").status_code == 200
