"""/v1/aliases over a socket: set, publish, roll back, and what a request for the alias gets meanwhile."""

from __future__ import annotations

from tests.service.http_fixtures import Served


def _chat_model(served: Served, name: str) -> tuple[str, str]:
    """The resolved model and the adapter digest of an answer."""
    raw = served.client().chat.completions.with_raw_response.create(
        model=name, messages=[{"role": "user", "content": "Hi"}]
    )
    return raw.parse().model, raw.headers["x-rootstock-adapter"]


def test_an_alias_is_set_read_listed_and_deleted(served: Served) -> None:
    model, http = served.control.publish(), served.http()
    made = http.put("/v1/aliases/best", json={"model": model}).raise_for_status().json()
    assert (made["id"], made["object"], made["model"], made["digest"]) == ("best", "alias", model, "d" * 64)
    assert [(move["model"], move["kind"]) for move in made["history"]] == [(model, "set")]
    assert http.get("/v1/aliases/best").json() == made
    assert http.get("/v1/aliases").json()["data"] == [made]
    assert http.delete("/v1/aliases/best").json() == {"id": "best", "object": "alias", "deleted": True}
    assert http.get("/v1/aliases/best").status_code == 404
    assert served.client().models.retrieve(model).id == model


def test_the_next_request_uses_what_the_alias_points_at_now(served: Served) -> None:
    http = served.http()
    first = served.control.publish(alias="best", digest="a" * 64)
    assert _chat_model(served, "best") == (first, "a" * 64)
    second = served.control.publish(alias="best", digest="b" * 64)
    assert _chat_model(served, "best") == (second, "b" * 64)
    rolled = http.post("/v1/aliases/best/rollback").raise_for_status().json()
    assert (rolled["model"], rolled["history"][0]["kind"]) == (first, "rollback")
    assert _chat_model(served, "best") == (first, "a" * 64)
    again = http.post("/v1/aliases/best/rollback")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "nothing_to_roll_back")


def test_wrong_requests_name_the_field(served: Served) -> None:
    http, model = served.http(), served.control.publish()
    for name, body, status, param in (
        ("best", {"model": "ft:none"}, 404, "model"),
        ("best", {}, 400, "model"),
        ("best", {"model": model, "colour": 1}, 400, "colour"),
        ("a,b", {"model": model}, 400, "alias"),
        ("tiny", {"model": model}, 400, "alias"),
    ):
        response = http.put(f"/v1/aliases/{name}", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert http.get("/v1/aliases", params={"colour": 1}).status_code == 400


def test_another_tenants_alias_is_a_404(served: Served) -> None:
    model = served.control.publish(alias="best")
    other = served.http(served.control.zenith_key)
    assert other.get("/v1/aliases").json()["data"] == []
    for response in (
        other.get("/v1/aliases/best"),
        other.delete("/v1/aliases/best"),
        other.post("/v1/aliases/best/rollback"),
        other.put("/v1/aliases/best", json={"model": model}),
    ):
        assert response.status_code == 404
    assert served.control.registry.resolve(served.control.acme.id, "best").id == model
