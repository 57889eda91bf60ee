"""/v1/feedback and /v1/settings over a socket: what is taken, what is kept, whose it is."""

from __future__ import annotations

import pytest

from tests.service.http_fixtures import Served

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def answered(served: Served, path: str = "chat/completions", **fields: object) -> str:
    body = ASK if path.startswith("chat") else {"model": "tiny", "prompt": "Hi"}
    answer = served.http().post(f"/v1/{path}", json={**body, **fields}).raise_for_status()
    return str(answer.json()["id"])


def test_feedback_names_the_version_that_answered(served: Served) -> None:
    model, http = served.control.publish(alias="best"), served.http()
    for name, path, alias in ((model, "chat/completions", None), ("best", "completions", "best")):
        completion = answered(served, path, model=name)
        given = http.post("/v1/feedback", json={"completion_id": completion, "rating": "up", "label": "greeting"})
        body = given.raise_for_status().json()
        assert (body["model"], body["digest"], body["alias"], body["arm"]) == (model, "d" * 64, alias, None)
        assert (body["object"], body["rating"], body["label"]) == ("feedback", 1.0, "greeting")
    body = http.post("/v1/feedback", json={"completion_id": answered(served), "rating": -0.5}).json()
    assert (body["model"], body["digest"], body["rating"]) == ("tiny", None, -0.5)


def test_feedback_on_a_stream_may_come_while_it_runs(served: Served) -> None:
    served.engine.endless = True
    http = served.http()
    with http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as stream:
        line = next(line for line in stream.iter_lines() if line.startswith("data:"))
        completion = line.split('"id":"')[1].split('"')[0]
        opinion = {"completion_id": completion, "rating": "down"}
        assert served.http().post("/v1/feedback", json=opinion).status_code == 200


def test_the_last_word_of_each_user_counts(served: Served) -> None:
    completion, http = answered(served), served.http()

    def give(**fields: object) -> str:
        given = http.post("/v1/feedback", json={"completion_id": completion, **fields})
        return str(given.raise_for_status().json()["id"])

    first = give(rating="up", label="good")
    assert give(rating="down") == first
    ada = give(rating="up", user="ada-lovelace")
    assert ada != first and give(label="fine", user="ada-lovelace") == ada
    listed = http.get("/v1/feedback").json()["data"]
    assert [(entry["id"], entry["rating"], entry["label"]) for entry in listed] == [
        (ada, None, "fine"),
        (first, -1.0, None),
    ]
    assert "ada-lovelace" not in str(listed)
    page = http.get("/v1/feedback", params={"limit": 1}).json()
    assert page["has_more"] and http.get("/v1/feedback", params={"after": page["last_id"]}).json()["data"] == listed[1:]


def test_corrected_text_is_kept_only_by_consent_and_erased_with_it(served: Served) -> None:
    completion, http = answered(served), served.http()
    opinion = {"completion_id": completion, "corrected": "Good day."}
    defaults = {"object": "settings", "capture": False, "capture_days": 30, "retraining": "propose"}
    assert http.get("/v1/settings").json() == defaults
    refused = http.post("/v1/feedback", json=opinion)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "corrected")
    assert "/v1/settings" in refused.json()["error"]["message"] and http.get("/v1/feedback").json()["data"] == []
    http.put("/v1/settings", json={"capture": True}).raise_for_status()
    assert served.http(served.control.zenith_key).get("/v1/settings").json()["capture"] is False
    assert http.post("/v1/feedback", json=opinion).json()["corrected"] == "Good day."
    http.put("/v1/settings", json={"capture": False}).raise_for_status()
    (kept,) = http.get("/v1/feedback").json()["data"]
    assert kept["corrected"] is None


def test_another_tenants_completion_is_a_404(served: Served) -> None:
    completion, other = answered(served), served.http(served.control.zenith_key)
    response = other.post("/v1/feedback", json={"completion_id": completion, "rating": "up"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "completion_not_found")
    assert served.http().post("/v1/feedback", json={"completion_id": completion, "rating": "up"}).status_code == 200
    assert other.get("/v1/feedback").json()["data"] == []


def test_one_answer_takes_only_so_much_feedback(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.feedback.MAX_USERS", 2)
    completion, http = answered(served), served.http()
    codes = [
        http.post("/v1/feedback", json={"completion_id": completion, "rating": 1, "user": f"u{n}"}).status_code
        for n in (1, 2, 3, 1)
    ]
    assert codes == [200, 200, 400, 200]


def test_wrong_requests_name_the_field(served: Served) -> None:
    http, completion = served.http(), answered(served)
    for body, param in (
        ({}, "completion_id"),
        ({"completion_id": completion}, "rating"),
        ({"completion_id": completion, "rating": "great"}, "rating"),
        ({"completion_id": completion, "rating": 1.5}, "rating"),
        ({"completion_id": completion, "rating": True}, "rating"),
        ({"completion_id": completion, "label": ""}, "label"),
        ({"completion_id": completion, "rating": "up", "stars": 5}, "stars"),
        ({"completion_id": completion, "rating": "up", "user": 5}, "user"),
    ):
        response = http.post("/v1/feedback", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), body
    assert http.put("/v1/settings", json={"capture": "yes"}).json()["error"]["param"] == "capture"
    assert http.get("/v1/feedback", params={"colour": 1}).status_code == 400
