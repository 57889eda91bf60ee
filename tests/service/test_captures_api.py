"""/v1/captures over a socket: nothing is kept without consent, and what is kept can be seen and forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from service.tables import metadata
from tests.service.http_fixtures import Served

PROMPT, ANSWER = "Wo ist mein verlorener Regenschirm?", "Grüße, world!"
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}]}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "call-1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "tool_call_id": "call-1", "content": "nothing"}


def ask(served: Served, path: str = "chat/completions", **fields: Any) -> str:
    body: dict[str, object] = ASK if path.startswith("chat") else {"model": "tiny", "prompt": PROMPT, "max_tokens": 9}
    return str(served.http().post(f"/v1/{path}", json={**body, **fields}).raise_for_status().json()["id"])


def stream(served: Served) -> None:
    with served.http().stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer:
        assert b"[DONE]" in b"".join(answer.iter_bytes())


def kept(served: Served, **query: str) -> list[dict[str, Any]]:
    served.rollout.traffic.flush()
    listed: list[dict[str, Any]] = served.http().get("/v1/captures", params=query).raise_for_status().json()["data"]
    return listed


def dump(served: Served) -> str:
    """Every row of every table."""
    served.rollout.traffic.flush()
    with served.control.database.read() as connection:
        return "\n".join(str(row) for table in metadata.sorted_tables for row in connection.execute(sa.select(table)))


def consent(served: Served) -> None:
    served.http().put("/v1/settings", json={"capture": True}).raise_for_status()


def test_without_consent_no_table_holds_a_word_of_prompts_or_answers(served: Served) -> None:
    http, completion = served.http(), ask(served)
    stream(served)
    ask(served, "completions")
    http.post("/v1/feedback", json={"completion_id": completion, "rating": "up", "label": "right"}).raise_for_status()
    refused = http.post("/v1/feedback", json={"completion_id": completion, "corrected": "Im Zug."})
    assert refused.status_code == 400
    found = dump(served)
    assert completion in found
    for text in (PROMPT, "Regenschirm", "Grüße", "world", "Im Zug"):
        assert text not in found
    assert kept(served) == []


def test_with_consent_prompt_and_answer_are_kept_and_shown_with_their_end(served: Served) -> None:
    consent(served)
    chat, legacy = ask(served, user="ada-lovelace"), ask(served, "completions")
    stream(served)
    streamed, second, first = kept(served)
    assert (first["id"], second["id"]) == (chat, legacy) and streamed["answer"] == ANSWER
    assert (first["object"], first["model"], first["answer"]) == ("capture", "tiny", ANSWER)
    assert first["messages"] == ASK["messages"] and second["prompt"] == PROMPT
    assert first["expires_at"] - first["created_at"] == 30 * 86400 and first["bytes"] == len((PROMPT + ANSWER).encode())
    assert "ada-lovelace" not in dump(served)
    assert served.http(served.control.zenith_key).get("/v1/captures").json()["data"] == []


@pytest.mark.parametrize(
    "fields",
    [{"store": False}, {"n": 2}, {"messages": [*ASK["messages"], CALL, RESULT]}],
    ids=["store: false", "several choices", "tools"],
)
def test_what_cannot_or_shall_not_be_learned_from_is_not_kept(served: Served, fields: dict[str, Any]) -> None:
    consent(served)
    ask(served, **fields)
    assert kept(served) == [] and PROMPT not in dump(served)


def test_store_true_is_granted_with_consent_and_refused_without(served: Served) -> None:
    refused = served.http().post("/v1/chat/completions", json={**ASK, "store": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "capture_off")
    consent(served)
    assert [capture["id"] for capture in kept(served)] == [] and ask(served, store=True) == kept(served)[0]["id"]
    several = served.http().post("/v1/chat/completions", json={**ASK, "store": True, "n": 2})
    assert (several.status_code, several.json()["error"]["param"]) == (400, "store")


def test_one_end_user_or_everybody_is_forgotten(served: Served) -> None:
    consent(served)
    ada, other = ask(served, user="ada-lovelace"), ask(served)
    assert [capture["id"] for capture in kept(served, user="ada-lovelace")] == [ada]
    served.http().post("/v1/feedback", json={"completion_id": other, "corrected": "Im Zug."}).raise_for_status()
    gone = served.http().delete("/v1/captures", params={"user": "ada-lovelace"}).json()
    assert (gone["object"], gone["num_captures"], gone["num_corrections"]) == ("captures.deleted", 1, 0)
    assert [capture["id"] for capture in kept(served)] == [other]
    gone = served.http().delete("/v1/captures").json()
    assert (gone["num_captures"], gone["num_corrections"]) == (1, 1)
    assert PROMPT not in dump(served) and "Im Zug" not in dump(served)


def test_turning_capture_off_erases_what_was_kept(served: Served) -> None:
    consent(served)
    completion = ask(served)
    served.http().post("/v1/feedback", json={"completion_id": completion, "corrected": "Im Zug."}).raise_for_status()
    served.http().put("/v1/settings", json={"capture": False}).raise_for_status()
    assert PROMPT not in dump(served) and "Im Zug" not in dump(served)
    ask(served)
    assert PROMPT not in dump(served)


def test_settings_change_one_by_one_and_wrong_ones_are_named(served: Served) -> None:
    http = served.http()
    body = http.put("/v1/settings", json={"capture_days": 7, "retraining": "auto"}).json()
    assert body == {"object": "settings", "capture": False, "capture_days": 7, "retraining": "auto"}
    for field, value in (("capture_days", 0), ("capture_days", 366), ("retraining", "always"), ("colour", 1)):
        refused = http.put("/v1/settings", json={field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert http.get("/v1/settings").json() == body


@pytest.mark.slow
def test_quality_is_shown_for_each_version_and_as_a_gauge(served: Served) -> None:
    http = served.http()
    assert http.get("/v1/quality").json()["data"] == []
    for number in range(20):
        completion = ask(served)
        label = ANSWER if number else "something else"
        given = http.post("/v1/feedback", json={"completion_id": completion, "label": label, "rating": 0.5}).json()
        assert given["correct"] is bool(number)
    (found,) = http.get("/v1/quality").json()["data"]
    assert (found["object"], found["model"], found["digest"], found["falling"]) == ("quality", "tiny", None, False)
    accuracy = found["accuracy"]
    assert (accuracy["judged"], accuracy["rolling"]["n"], accuracy["rolling"]["value"]) == (20, 20, 0.95)
    low, high = accuracy["rolling"]["interval"]
    assert 0.7 < low < 0.95 < high < 1.0
    assert accuracy["baseline"] is None and accuracy["change"] is None, "the first 100 are not there yet"
    assert found["rating"]["rolling"] == {"n": 20, "value": pytest.approx(0.5)}
    text = served.scrape()
    assert f'rootstock_tenant_accuracy{{tenant="{served.control.acme.id}"}} 0.95' in text
    assert f'rootstock_tenant_feedback_total{{tenant="{served.control.acme.id}"}} 20.0' in text
    assert served.http(served.control.zenith_key).get("/v1/quality").json()["data"] == []
