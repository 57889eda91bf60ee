"""Every route of the app, asked by who may not: nobody, the wrong key, another tenant. A new route needs an entry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from service.api.auth import INFERENCE_ROUTES
from service.api.routes import ROUTERS
from service.keys import Role
from service.merges import Merges
from service.tables import retraining_proposals
from tests.service.drift_fixtures import FakeMonitors
from tests.service.http_fixtures import ADMIN_KEY, Served, certificates, serve_fake

Route = tuple[str, str]

ROUTES: list[Route] = sorted(
    (method, route.path)
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in route.methods or ()
)

ALIAS = "best-of-all"
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
FILE = {"files": {"file": ("train.jsonl", b"{}")}, "data": {"purpose": "fine-tune"}}


@dataclass(frozen=True)
class Ask:
    """How a route is asked about something of another's. `names` are the path's parameters or the body's fields that
    name it, by what they name; `status` is that of the answer for what is not there."""

    names: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    status: int = 404
    kind: str = "json"


def of(kind: str, body: dict[str, Any] | None = None) -> Ask:
    """A route whose path names one thing."""
    return Ask({"path": kind}, body)


OWN = Ask()
"""It names nothing: it answers about the caller's own, which other tests look at in detail."""
ADMIN = Ask()

ENTRIES: dict[Route, Ask] = {
    ("POST", "/v1/chat/completions"): Ask({"model": "model"}, CHAT),
    ("POST", "/v1/completions"): Ask({"model": "model"}, {"prompt": "hello"}),
    ("POST", "/v1/embeddings"): Ask({"model": "model"}, {"input": "hello"}),
    ("POST", "/v1/files"): OWN,
    ("GET", "/v1/files"): Ask({"?after": "file"}, status=400),
    ("GET", "/v1/files/{file_id}"): of("file"),
    ("GET", "/v1/files/{file_id}/content"): of("file"),
    ("DELETE", "/v1/files/{file_id}"): of("file"),
    ("POST", "/v1/files/{file_id}/report"): of("file"),
    ("POST", "/v1/fine_tuning/jobs"): Ask({"training_file": "file"}, {"model": "tiny"}, status=400),
    ("POST", "/v1/fine_tuning/estimate"): Ask({"training_file": "file"}, {"model": "tiny"}, status=400),
    ("GET", "/v1/fine_tuning/jobs"): Ask({"?after": "job"}, status=400),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): of("job"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): of("job"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): of("job"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): of("job"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): of("job"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): of("job"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/report"): of("job"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/evaluation"): of("job"),
    ("GET", "/v1/models"): OWN,
    ("GET", "/v1/models/{model:path}"): of("model"),
    ("DELETE", "/v1/models/{model:path}"): of("model"),
    ("POST", "/v1/adapters/{model:path}/merge"): of("model"),
    ("GET", "/v1/merges"): OWN,
    ("GET", "/v1/merges/{merge_id}"): of("merge"),
    ("GET", "/v1/merges/{merge_id}/content"): Ask({"path": "merge"}, {"?file": "README.md"}),
    ("DELETE", "/v1/merges/{merge_id}"): of("merge"),
    ("GET", "/v1/adapters"): OWN,
    ("POST", "/v1/adapters"): OWN,
    ("GET", "/v1/adapters/{model:path}/card"): of("model"),
    ("GET", "/v1/adapters/{model:path}/export"): of("model"),
    ("GET", "/v1/adapters/{model:path}"): of("model"),
    ("GET", "/v1/aliases"): OWN,
    ("PUT", "/v1/aliases/{alias}"): Ask({"model": "model"}, {}),
    ("GET", "/v1/aliases/{alias}"): of("alias"),
    ("DELETE", "/v1/aliases/{alias}"): of("alias"),
    ("POST", "/v1/aliases/{alias}/promote"): of("alias"),
    ("POST", "/v1/aliases/{alias}/rollback"): of("alias"),
    ("PUT", "/v1/aliases/{alias}/canary"): of("alias", {"model": "tiny", "percent": 5}),
    ("GET", "/v1/aliases/{alias}/canary"): of("alias"),
    ("DELETE", "/v1/aliases/{alias}/canary"): of("alias"),
    ("PUT", "/v1/aliases/{alias}/shadow"): of("alias", {"model": "tiny", "percent": 5}),
    ("GET", "/v1/aliases/{alias}/shadow"): of("alias"),
    ("DELETE", "/v1/aliases/{alias}/shadow"): of("alias"),
    ("GET", "/v1/aliases/{alias}/experiments"): of("alias"),
    ("GET", "/v1/gate_policy"): OWN,
    ("PUT", "/v1/gate_policy"): OWN,
    ("POST", "/v1/feedback"): Ask({"completion_id": "completion"}, {"rating": 1}),
    ("GET", "/v1/feedback"): Ask({"?after": "feedback"}, status=400),
    ("GET", "/v1/drift"): OWN,
    ("GET", "/v1/drift/{model:path}"): of("model"),
    ("POST", "/v1/drift/{model:path}/acknowledge"): of("model", {}),
    ("GET", "/v1/drift_events"): Ask({"?model": "model"}),
    ("GET", "/v1/settings"): OWN,
    ("PUT", "/v1/settings"): OWN,
    ("GET", "/v1/quality"): OWN,
    ("GET", "/v1/captures"): Ask({"?after": "completion"}, status=400),
    ("DELETE", "/v1/captures"): OWN,
    ("POST", "/v1/retraining"): Ask({"model": "model"}, {}),
    ("GET", "/v1/retraining"): Ask({"?after": "retraining"}, status=400),
    ("GET", "/v1/retraining/{retraining_id}"): of("retraining"),
    ("POST", "/v1/retraining/{retraining_id}/approve"): of("retraining"),
    ("POST", "/v1/retraining/{retraining_id}/dismiss"): of("retraining"),
    ("GET", "/v1/usage"): OWN,
    ("GET", "/v1/keys"): OWN,
    ("POST", "/v1/keys"): OWN,
    ("POST", "/v1/keys/{key_id}/rotate"): of("key"),
    ("DELETE", "/v1/keys/{key_id}"): of("key"),
    **{route: ADMIN for route in ROUTES if route[1].startswith("/v1/admin/")},
}


@dataclass(frozen=True)
class House:
    """A service in which zenith has one of everything; `theirs` are the ids, `nobodys` such that never were."""

    served: Served
    theirs: dict[str, str]
    nobodys: dict[str, str]
    keys: dict[str, str]
    http: httpx.Client

    def ask(self, route: Route, key: str | None, named: dict[str, str] | None = None) -> httpx.Response:
        method, path = route
        entry, named = ENTRIES[route], self.nobodys if named is None else named
        request: dict[str, Any] = {"json": None, "params": {}}
        for name, value in (entry.body or {}).items():
            if name.startswith("?"):
                request["params"][name[1:]] = value
            else:
                request["json"] = {**(request["json"] or {}), name: value}
        if entry.body == {}:
            request["json"] = {}
        for name, kind in entry.names.items():
            if name == "path":
                path = re.sub(r"\{[^}]*\}", named[kind].replace("\\", r"\\"), path)
            elif name.startswith("?"):
                request["params"][name[1:]] = named[kind]
            else:
                request["json"] = {**(request["json"] or {}), name: named[kind]}
        path = re.sub(r"\{[^}]*\}", "anything", path)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return self.http.request(method, path, headers=headers, **request)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("house")
    with serve_fake(directory, FakeMonitors()) as served:
        control = served.control
        merges = Merges(control.database, directory / "merged", max_bytes=1 << 40, ttl_seconds=3600.0)
        served.add_merges(merges, served.api.state.services.base)
        model = control.publish(control.zenith, suffix="secret", alias=ALIAS)
        file_id = control.upload(control.zenith)
        job = control.create_job(control.zenith)
        merge = merges.create(control.zenith.id, control.registry.versions(control.zenith.id)[0], 10)
        zenith = served.http(control.zenith_key)
        completion = zenith.post("/v1/chat/completions", json={"model": ALIAS, **CHAT}).json()["id"]
        given = zenith.post("/v1/feedback", json={"completion_id": completion, "rating": 1}).raise_for_status().json()
        proposal = {"id": "retraining-of-zenith", "tenant_id": control.zenith.id, "target": ALIAS, "model": model}
        told = {
            "trigger": "request",
            "reason": "asked",
            "options": {},
            "state": "dismissed",
            "seed": 1,
            "created_at": 1.0,
        }
        with control.database.begin() as connection:
            connection.execute(retraining_proposals.insert().values(**proposal, **told))
        key, _ = control.tenants.create_key(control.zenith.id)
        control.registry.version(control.zenith.id, model)
        theirs = {
            "file": file_id,
            "job": job.id,
            "model": model,
            "alias": ALIAS,
            "merge": merge.id,
            "completion": completion,
            "feedback": given["id"],
            "retraining": proposal["id"],
            "key": key.id,
        }
        nobodys = {kind: _never_was(value) for kind, value in theirs.items()}
        _, expired = control.tenants.create_key(control.acme.id, expires_in_seconds=-1.0)
        _, inference = control.tenants.create_key(control.acme.id, role=Role.INFERENCE)
        keys = {"expired": expired, "inference": inference, "unknown": control.acme_key[:-3] + "xyz", "not a key": "x"}
        with httpx.Client(base_url=served.url, timeout=30, verify=certificates()) as http:
            yield House(served, theirs, nobodys, keys, http)


def _never_was(value: str) -> str:
    """Of the same shape and length."""
    return value[:-4] + "".join("a" if letter != "a" else "b" for letter in value[-4:])


def _plain(response: httpx.Response, named: dict[str, str]) -> tuple[int, str, set[str], dict[str, str]]:
    """What an answer shows, with the id that was asked for, and what changes with every answer, made alike."""
    text = response.text
    for value in sorted(named.values(), key=len, reverse=True):
        text = text.replace(value, "ID")
    changing = {"x-request-id", "x-trace-id", "date", "content-length"}
    headers = {name: value for name, value in response.headers.items() if name not in changing}
    return response.status_code, text, set(response.headers), headers


def test_every_route_has_an_entry() -> None:
    assert set(ENTRIES) == set(ROUTES), "say in ENTRIES what a new route names, so that it is walked as all others"
    for (_, path), entry in ENTRIES.items():
        if "{" in path and not path.startswith("/v1/admin/"):
            assert entry.names, f"{path} names something"


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_no_route_answers_without_a_valid_key(house: House, route: Route) -> None:
    for key in (None, *(house.keys[name] for name in ("expired", "unknown", "not a key"))):
        answer = house.ask(route, key)
        assert answer.status_code == 401, (key, answer.text)
        assert answer.json()["error"]["type"] and "zenith" not in answer.text


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_an_admin_key_is_no_tenants_and_a_tenants_is_no_admins(house: House, route: Route) -> None:
    wrong = house.served.control.acme_key if route[1].startswith("/v1/admin/") else ADMIN_KEY
    assert house.ask(route, wrong).status_code == 403


@pytest.mark.parametrize("route", [route for route in ROUTES if not route[1].startswith("/v1/admin/")], ids=" ".join)
def test_a_key_for_inference_opens_nothing_else(house: House, route: Route) -> None:
    status = house.ask(route, house.keys["inference"], house.theirs).status_code
    assert (status == 403) == (route not in INFERENCE_ROUTES), status


@pytest.mark.parametrize("route", [route for route, entry in ENTRIES.items() if entry.names], ids=" ".join)
def test_what_is_another_tenants_is_as_if_it_never_was(house: House, route: Route) -> None:
    acme = house.served.control.acme_key
    asked = (house.ask(route, acme, house.theirs), house.ask(route, acme, house.nobodys))
    theirs, nobodys = _plain(asked[0], house.theirs), _plain(asked[1], house.nobodys)
    assert theirs == nobodys
    assert theirs[0] == ENTRIES[route].status, asked[0].text


def test_nothing_of_theirs_was_changed_by_all_that(house: House) -> None:
    """The owner still has it all: the walk above tried to delete and change everything."""
    control, zenith = house.served.control, house.served.control.zenith.id
    assert control.files.get(zenith, house.theirs["file"])
    assert control.jobs.get(zenith, house.theirs["job"]).status == "validating_files"
    assert control.registry.version(zenith, house.theirs["model"])
    assert house.theirs["key"] in [key.id for key in control.tenants.keys(zenith)]
    http = house.served.http(control.zenith_key)
    for kind, path in (("alias", "aliases"), ("merge", "merges"), ("retraining", "retraining")):
        assert http.get(f"/v1/{path}/{house.theirs[kind]}").status_code == 200, kind
    assert [one["id"] for one in http.get("/v1/feedback").json()["data"]] == [house.theirs["feedback"]]


def test_lists_hold_only_ones_own(house: House) -> None:
    acme = house.served.control.acme_key
    for route in ROUTES:
        if route[0] == "GET" and "{" not in route[1] and not route[1].startswith("/v1/admin/"):
            params = {"start_time": "1"} if route[1] == "/v1/usage" else {}
            answer = house.http.get(route[1], params=params, headers={"authorization": f"Bearer {acme}"})
            assert answer.status_code == 200, (route, answer.text)
            for kind, value in house.theirs.items():
                assert kind == "alias" or value not in answer.text, (route, kind)
            assert house.served.control.zenith.id not in answer.text


def test_the_same_bytes_as_another_tenants_are_a_file_of_ones_own(house: House) -> None:
    """Adapters are stored once, whoever has them; nothing that a client sees depends on that."""
    answers = []
    for key in (house.served.control.zenith_key, house.served.control.acme_key):
        http = house.served.http(key)
        answers.append(http.post("/v1/files", **FILE).json())  # type: ignore[arg-type]
    assert answers[0].pop("id") != answers[1].pop("id")
    assert {k: v for k, v in answers[0].items() if k != "created_at"} == {
        k: v for k, v in answers[1].items() if k != "created_at"
    }


def test_a_key_that_ends_is_refused_at_the_next_request_of_a_warm_connection(house: House, tmp_path: Path) -> None:
    control, served = house.served.control, house.served
    key, text = control.tenants.create_key(control.acme.id)
    http = served.http(text)
    for _ in range(3):
        assert http.post("/v1/chat/completions", json={"model": "tiny", **CHAT}).status_code == 200
    control.tenants.revoke_key(control.acme.id, key.id)
    assert http.post("/v1/chat/completions", json={"model": "tiny", **CHAT}).status_code == 401


def test_ids_cannot_be_guessed(house: House) -> None:
    """More than 100 random bits in what a client is given (a UUID's: two of its digits are not random)."""
    http = house.served.http()
    body = {"model": "tiny", **CHAT}
    ids = {http.post("/v1/chat/completions", json=body).json()["id"] for _ in range(20)}
    tails = [id_.rsplit("-", 1)[-1] for id_ in ids]
    assert len(ids) == 20 and all(len(tail) >= 24 for tail in tails)
    places = [{tail[index] for tail in tails} for index in range(24)]
    assert sum(len(place) > 1 for place in places) >= 22
    assert re.fullmatch(r"req_[0-9a-f]{32}", http.get("/v1/models").headers["x-request-id"])
